"""`dqrm report`: runs or a study as one page."""

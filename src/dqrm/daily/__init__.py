"""`dqrm daily`: one model per day, each from the one before, evaluated on the day before it is trained on."""

"""The configuration of the generated click log; cheap to import."""

from dataclasses import dataclass

from dqrm.options import check_fields


@dataclass(frozen=True)
class GenerateConfig:
    """What `dqrm.data.synthetic.generate` draws. The same configuration gives the same bytes."""

    rows: int = 400_000
    """Lines to generate; the high-cardinality columns grow with them."""
    seed: int = 1
    """Seed of the known model and of everything drawn from it."""
    click_rate: float = 0.25
    """Fraction of lines that are clicks, between 0.01 and 0.99."""
    missing: float = 1.0
    """Factor on each column's fraction of missing fields, from 0 (none) to 1 (as in Criteo's log)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if not 0.01 <= self.click_rate <= 0.99:
            raise ValueError(f"click_rate: got {self.click_rate}, expected a fraction between 0.01 and 0.99")
        if not 0 <= self.missing <= 1:
            raise ValueError(f"missing: got {self.missing}, expected a factor between 0 and 1")

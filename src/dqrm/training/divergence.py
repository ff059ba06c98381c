"""The likely cause of a diverged training run, from its data."""

from dqrm.data.dataset import Dataset

# Dense values of a larger magnitude are named when a loss diverges; log1p leaves none above 89.
WIDE = 100.0


def too_wide(dataset: Dataset) -> str:
    """Advice on dense columns whose values alone make a loss infinite; empty if there are none."""
    wide = dataset.wide(above=WIDE)
    if not wide:
        return ""
    columns = ", ".join(f"{name} (up to {value:.3g})" for name, value in wide.items())
    return (
        f"values of the dense column{'s' * (len(wide) > 1)} {columns} are too large: prepare the data with "
        f"dense_transform log1p (now {dataset.info['schema'].get('dense_transform')}), or leave such columns out; or "
    )

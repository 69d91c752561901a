"""What an evaluation yields: values, their spread, and why some are missing."""

import math
from dataclasses import dataclass, field


@dataclass
class Scores:
    """Metrics by name.

    Args:
        values: finite numbers only.
        errors: standard errors by the same names, where one is defined: of means over images (PSNR, SSIM, LPIPS, loss)
            and of shares (precision, recall, accuracies). For ``is`` and ``kid`` it is the customary standard deviation
            over splits and subsets. FID and sFID have none; their bias with the number of images is larger.
        missing: names of what could not be computed, and the reason.
    """

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, error: float | None = None, *, cause: str = "") -> None:
        """Take in one metric; a value that is not finite becomes a missing one, for the ``cause`` that makes it so."""
        if not math.isfinite(value):
            self.missing[name] = f"the result is {value}" + (f": {cause}" if cause else "")
            return
        self.values[name] = float(value)
        if error is not None and math.isfinite(error):
            self.errors[name] = float(error)

    def add_share(self, name: str, share: float, count: int, *, cause: str = "") -> None:
        """A share of ``count`` independent images, with its binomial standard error."""
        self.add(
            name, share, math.sqrt(share * (1 - share) / count) if count and 0 <= share <= 1 else None, cause=cause
        )

    def update(self, other: "Scores", prefix: str = "") -> None:
        """Take in everything of ``other``, ``prefix`` in front of the names."""
        self.values |= {prefix + name: value for name, value in other.values.items()}
        self.errors |= {prefix + name: error for name, error in other.errors.items()}
        self.missing |= {prefix + name: reason for name, reason in other.missing.items()}

    def renamed(self, suffix: str) -> "Scores":
        """The same with ``suffix`` behind every name."""
        return Scores(
            {name + suffix: value for name, value in self.values.items()},
            {name + suffix: error for name, error in self.errors.items()},
            {name + suffix: reason for name, reason in self.missing.items()},
        )

    def logged(self) -> dict[str, float]:
        """Values, and errors under ``se/NAME``, for a logger."""
        return self.values | {f"se/{name}": value for name, value in self.errors.items()}

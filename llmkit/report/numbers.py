"""Numbers and keys of results as a page writes them."""

from __future__ import annotations

from typing import Any

WORDS = {  # what people call a figure, where its key does not say it
    "val_loss": "held-out loss",
    "val_bits_per_byte": "bits per byte",
    "val_accuracy": "accuracy",
    "val_success": "held-out success",
    "val_reward": "held-out reward",
    "val_gold": "gold reward",
    "vocab_size": "vocabulary",
    "bytes_per_token": "bytes per token",
    "kept_step": "step kept",
    "val_comparisons": "held-out comparisons",
}
SHARES = ("accuracy", "val_accuracy", "success", "val_success", "called", "val_called")
FORMS = {"seconds": "seconds", **dict.fromkeys(SHARES, "share")}  # of figures, by their keys


def figure_text(value: Any, form: str = "") -> str:
    """A number as people write it: thousands apart, four decimals at most; `form` is "share", "seconds", "short" (three
    digits, where a glance is enough) or "".

    >>> figure_text(1234567), figure_text(0.52630), figure_text(2.0), figure_text(0.000012)
    ('1,234,567', '0.5263', '2', '1.2e-05')
    >>> figure_text(0.61, "share"), figure_text(0.8125, "share"), figure_text(516.2, "seconds")
    ('61%', '81.2%', '8.6 min')
    >>> figure_text(0.49921, "short"), figure_text(2.8052, "short"), figure_text(1234.5, "short")
    ('0.499', '2.81', '1,234.5')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if form == "share":
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    if form == "seconds":
        for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
            if value >= 1.5 * length:
                return f"{value / length:.1f}".removesuffix(".0") + f" {unit}"
        return f"{value:.3g} s"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 0.001 or abs(value) >= 1e15:
        return f"{value:.3g}"
    if form == "short" and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.1f}"


def words(key: str) -> str:
    """A key of results as people say it."""
    return WORDS.get(key, key.replace("_", " "))


def percent(part: float, whole: float) -> str:
    """A share, such as 12.5%; nothing of nothing."""
    return f"{part / whole:.1%}" if whole else ""

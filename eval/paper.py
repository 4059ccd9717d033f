"""The numbers that the paper prints, to stand beside ours: measured on Cam-CAN and BRATS 2017.

Source: You et al., MIDL 2019, Tables 1 and 2. Each row: mean and std over subjects of the Dice at
four thresholds, pooled AUC, FPR and FNR; None where the paper has "na".
"""

from dataclasses import dataclass

DATA = "paper: Cam-CAN, BRATS 2017"
DIGITS = 2  # that it prints


@dataclass(frozen=True)
class PaperRow:
    """One row: Dice as (mean, std), rates as fractions."""

    dsc_auc: tuple | None
    auc: float
    fpr: float
    fnr: float
    dsc1: tuple | None
    dsc5: tuple | None
    dsc10: tuple | None


TABLE_1 = {
    "vae": PaperRow((0.34, 0.18), 0.80, 0.11, 0.40, (0.34, 0.20), (0.36, 0.27), (0.40, 0.24)),
    "gmvae": PaperRow((0.37, 0.18), 0.83, 0.12, 0.34, (0.22, 0.21), (0.46, 0.23), (0.43, 0.20)),
    "vae-256": PaperRow(None, 0.67, 0.26, 0.43, None, None, None),
    "vae-128": PaperRow((0.22, 0.14), 0.69, 0.21, 0.46, (0.09, 0.06), (0.19, 0.15), (0.26, 0.17)),
    "aae-128": PaperRow((0.23, 0.13), 0.70, 0.25, 0.43, (0.03, 0.03), (0.18, 0.14), (0.23, 0.15)),
    "anogan": PaperRow((0.19, 0.10), 0.65, 0.33, 0.37, (0.02, 0.02), (0.10, 0.06), (0.19, 0.13)),
}
TABLE_1_LAMBDA = {"gmvae": 1.8}
TABLE_2 = {
    3: PaperRow((0.27, 0.16), 0.78, 0.20, 0.35, (0.04, 0.07), (0.26, 0.19), (0.32, 0.19)),
    6: PaperRow((0.30, 0.18), 0.73, 0.11, 0.49, (0.06, 0.13), (0.35, 0.21), (0.28, 0.17)),
    9: PaperRow((0.37, 0.18), 0.83, 0.12, 0.34, (0.22, 0.21), (0.46, 0.23), (0.43, 0.20)),
    12: PaperRow((0.30, 0.17), 0.77, 0.14, 0.43, (0.08, 0.13), (0.37, 0.22), (0.33, 0.18)),
}

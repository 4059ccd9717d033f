"""Pages that show restored scans: a viewer with maps and masks, lesions, fit to the truth.

One HTML file a scan, which needs no network and no other file, and prints as one or two pages;
for a cohort a table of the subjects as well: what failed or is worth a look, then the worst.
"""

import argparse
import sys
from collections.abc import Sequence

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, refuse_existing

EXAMPLE = """example:
  tf-lesion detect patient_t2.nii.gz maps
  tf-lesion report --results maps

Takes about 12 s per scan at 1 mm."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = parser_for("tf-lesion report", __doc__, epilog=EXAMPLE)
    add(arguments, "--results", required=True)
    add(arguments, "--truth", "--scan", "--evaluation", "--target-fpr")
    add(arguments, "--out", help="HTML file; default: report.html, or of a cohort index.html")
    add(arguments, "--force")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print where it is; 1 if some scans have no page, being damaged."""
    options = parser().parse_args(argv)
    from tf_lesion.evaluation.results import failures, find_results, read_results
    from tf_lesion.report.pages import read_evaluation, write_report

    paths, failed = find_results(options.results), failures(options.results)
    cohort = len(paths) > 1 or bool(failed)
    if cohort and (options.truth or options.scan):
        raise InputError(
            f"--truth and --scan are for one scan; {options.results} holds {len(paths)}."
        )
    out = options.out or options.results / ("index.html" if cohort else "report.html")
    refuse_existing(out, force=options.force)
    evaluation = read_evaluation(options.evaluation) if options.evaluation else None
    given = {"scan": options.scan, "truth": options.truth, "target_fpr": options.target_fpr}
    results, missing = read_results(paths, whole=True, **given)
    thresholds = any(result.point for result in results)
    check_effect(parser(), options, {"--target-fpr": ("maps with thresholds", thresholds)})
    failed += missing
    missing += write_report(
        results, out, evaluation=evaluation, failed=failed, cohort=cohort, force=options.force
    )
    for lost in missing:
        print(f"error: {lost.name}: {lost.reason}", file=sys.stderr)
    print(f"Report: {out}")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())

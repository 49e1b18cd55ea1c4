"""Writes the base that `base.model` draws, for peers that read weights from a folder. No training.

`knobs["folder"]` is where to.
"""

import base
from protocol import Job, Report


def main() -> None:
    """Draw, and write one file."""
    job = Job.read()
    Report(job)
    base.model(job).save_pretrained(job.knobs["folder"], max_shard_size="100GB")


if __name__ == "__main__":
    main()

"""The truth that first losses are held against: each example alone, unpadded, in float32.

The weights are those that the peers load, so a bf16 base is compared with itself, computed
exactly; `knobs["numbers"]` are the examples asked for. No training.
"""

import torch
from torch.nn.functional import cross_entropy

import base
from protocol import Job, Report


@torch.no_grad()
def main() -> None:
    """Score each example."""
    job = Job.read()
    report = Report(job)
    model = base.model(job).float().eval().to(job.device)
    rows = job.rows()
    for number in job.knobs["numbers"]:
        ids = torch.tensor([rows[number]["input_ids"]], device=job.device)
        targets = torch.tensor(rows[number]["labels"][1:], device=job.device)
        logits = model(ids).logits[0, :-1]
        nats = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        report.scored(number, nats.item(), int((targets != -100).sum()))


if __name__ == "__main__":
    main()

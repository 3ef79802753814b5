"""zuko's part of a race: the loop of its tutorial "Train from data".

Adam at 1e-3, shuffled batches of 64 from a `DataLoader`, no schedule and no stopping rule. The
tutorial takes 8 epochs of 16,384 rows; here the loop goes on until the budget is spent, and the
table says what it had reached after 8. The tutorial does not validate: the time that validation
takes after every epoch is taken out of the clock.
"""

import time
from importlib.metadata import version

import torch
import torch.utils.data
import zuko
from _race_fit import Curve, OutOfTime, arguments, read

CHUNK = 2048


@torch.no_grad()
def validate(flow, rows) -> float:
    parts = [flow().log_prob(part).sum() for part in rows.split(CHUNK)]
    return float(torch.stack(parts).double().sum() / len(rows))


def train(flow, loader, validation, curve: Curve):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    epoch = 0
    while True:
        for (x,) in loader:
            loss = -flow().log_prob(x).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if curve.spent():
                raise OutOfTime
        epoch += 1
        seconds, since = curve.seconds(), time.perf_counter()
        value = validate(flow, validation)
        curve.pause(since)
        curve.add(value, epoch=epoch, seconds=seconds)


def main():
    args = arguments("zuko's part of a race.")
    rows = read(args.data)
    curve = Curve(args)
    torch.manual_seed(args.seed)
    flow = zuko.flows.NSF(
        features=rows.train.shape[1],
        transforms=args.layers,
        hidden_features=(args.width, args.width),
        bins=args.bins,
    )
    validation = torch.from_numpy(rows.validation)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(rows.train))
    curve.write(versions={n: version(n) for n in ("zuko", "torch")}, batch_size=64)
    curve.begin()
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    try:
        train(flow, loader, validation, curve)
    except OutOfTime:
        curve.end("budget")


if __name__ == "__main__":
    main()

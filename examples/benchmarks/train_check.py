"""The cost of masking in training: a step of IFP beside one of plain fine-tuning.

    python -m examples.benchmarks.train_check --model models/smollm2 [--tokens 128] [--turns 5]

Both train every weight of the same model with AdamW on the same batch, and take turns
in one process; seconds are processor time, which a busy machine does not lengthen. IFP
also trains a predictor (by default a copy of the model's first two layers) and computes
its masks. The plain step is mlx's own loop on the stock model. Memory is MLX's peak for
each alone, including weights and optimiser. Last line: JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from ifp_mlx.selection.calibration import calibration_chats
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import PredictorMasker
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.step import Pair, Step, target_losses
from ifp_mlx.training.trainee import Trainee, make_predictor, open_trainee

Move = Callable[[], object]


def batch_of(trainee: Trainee, rows: int, length: int) -> Batch:
    """Return running text: the first quarter selects, the rest is learned."""
    text = "\n".join(m["content"] for chat in calibration_chats() for m in chat)
    tokens = np.array(trainee.tokenizer.encode(text)[: rows * length], dtype=np.int32)
    table = tokens.reshape(rows, length)
    first = length // 4
    loss = np.tile(np.arange(length) >= first, (rows, 1)).astype(np.float32)
    lengths = mx.full((rows,), first, dtype=mx.int32)
    return Batch(mx.array(table[:, :first]), lengths, mx.array(table), mx.array(loss))


def plain(config: TrainConfig, batch_size: tuple[int, int]) -> Move:
    """Return a step of ordinary fine-tuning."""
    trainee = open_trainee(config)
    model, batch = trainee.model, batch_of(trainee, *batch_size)
    optimizer = optim.AdamW(config.lr, weight_decay=config.weight_decay)

    def loss() -> mx.array:
        losses = target_losses(model(batch.tokens[:, :-1]).astype(mx.float32), batch)
        return losses.sum() / batch.loss_mask.sum()

    gradient = nn.value_and_grad(model, loss)

    def move() -> None:
        value, grads = gradient()
        mx.eval(value, grads)  # as the trainer does before it descends
        optimizer.update(model, optim.clip_grad_norm(grads, config.clip)[0])
        mx.eval(model.parameters(), optimizer.state)

    return move


def masked(config: TrainConfig, batch_size: tuple[int, int]) -> Move:
    """Return a step of the trainer: predictor and model together."""
    trainee = open_trainee(config)
    batch = batch_of(trainee, *batch_size)
    masker = PredictorMasker(make_predictor(trainee, config))
    pair = Pair(trainee.model, masker)
    channels = trainee.plan.units
    step = Step(pair, config, compiled=False)
    return lambda: mx.eval(step([batch], config.budget(channels)))


def main() -> None:
    """Measure, and end with the report."""
    parser = argparse.ArgumentParser(description="Time a masked training step.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--predictor-layers", type=int, default=2)
    args = parser.parse_args()
    config = TrainConfig(model=args.model, predictor_layers=args.predictor_layers)
    size = args.rows, args.tokens
    ways = {"plain": plain, "masked": masked}
    peaks = {name: peak_bytes(way, config, size) for name, way in ways.items()}
    moves = {name: way(config, size) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in moves}
    for turn in tqdm(range(args.turns + 1), disable=None, leave=False):
        for name, move in moves.items():
            start = time.process_time()
            move()
            if turn:  # the first is not counted
                seconds[name].append(time.process_time() - start)
    ratios = [m / p for m, p in zip(seconds["masked"], seconds["plain"], strict=True)]
    report = {
        "model": args.model,
        "rows": args.rows,
        "tokens": args.tokens,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "step_ratio": statistics.median(ratios),
        "step_ratios": ratios,
        "peak_bytes": peaks,
        "memory_ratio": peaks["masked"] / peaks["plain"],
    }
    print(json.dumps(report))


def peak_bytes(
    way: Callable[[TrainConfig, tuple[int, int]], Move],
    config: TrainConfig,
    size: tuple[int, int],
) -> int:
    """Return MLX's peak over two steps of one way alone, the model included."""
    mx.clear_cache()
    mx.reset_peak_memory()
    move = way(config, size)
    move()
    move()
    return mx.get_peak_memory()


if __name__ == "__main__":
    main()

"""Training: a GradientTape loop that logs, checkpoints, resumes bitwise, and stops cleanly."""

import contextlib
import csv
import functools
import itertools
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.training.distribution import WORKER_ERRORS, Placement, make_placement
from tf_lesion.training.runs import Run, intact_checkpoint, named_variables, writing
from tf_lesion.training.update import GRADIENT_NORM, STOPPING, Updater

TEST_SLICES = 64  # fixed slices of `Test` on which the test losses are measured
PREFETCHED_BATCHES = 4
TERMS_SHOWN = 2  # in the progress bar
SAVE_SECONDS = 600  # at most this long is lost when a process dies, however slow the steps are


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite."""


class WorkerLostError(RuntimeError):
    """Another process of a distributed training died."""


def batch_rows(step: int, *, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Rows of the batch of `step`: each epoch is a permutation of its own; [batch_size].

    A pure function, so that a resumed run sees the batches of the uninterrupted one.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_rows)
    orders = [_permutation(num_rows, seed, epoch) for epoch in epochs.tolist()]
    return np.array([order[place] for order, place in zip(orders, places, strict=True)])


@functools.lru_cache(maxsize=2)
def _permutation(num_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batches(
    cache: SliceCache, config: Config, start: int, placement: Placement
) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """(rows [B], images [B, H, W, 1]) from step `start` on, read ahead.

    B slices are the part of the batch that this process takes.

    Raises:
        InputError: if the cache has slices that cannot be used.
    """
    size, failed = config.training.batch_size, []

    def generate():
        for step in range(start, config.training.steps):
            rows = batch_rows(step, num_rows=len(cache), batch_size=size, seed=config.seed)
            rows = placement.local(rows)
            try:
                yield rows, cache.read(rows)
            except InputError as error:
                failed.append(error)
                raise

    part = size // placement.workers
    signature = (tf.TensorSpec([part], tf.int64), tf.TensorSpec([part, *cache.shape, 1]))
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    try:
        yield from dataset.prefetch(PREFETCHED_BATCHES)
    except tf.errors.OpError as error:  # TensorFlow's, of which ours is a line
        raise failed[0] if failed else error from None


def _fixed_rows(cache, count):
    """Up to `count` rows spread evenly over the cache."""
    return np.unique(np.linspace(0, len(cache) - 1, min(count, len(cache))).astype(int))


class Trainer:
    """Trains one model in a run folder.

    Args:
        train, test: caches of `Train` and `Test`.
        resume: go on from the newest checkpoint of the run.
        placement: one device by default.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        *,
        train: SliceCache,
        test: SliceCache,
        resume: bool = False,
        placement: Placement | None = None,
    ):
        self.run, self.config, self.train_cache, self.test_cache = run, config, train, test
        self.placement = placement or make_placement()
        self.update = Updater(config, self.placement)
        self.model, self.step = self.update.model, self.update.step
        optimizers = self.update.optimizers.values()
        moments = itertools.chain.from_iterable(optimizer.variables for optimizer in optimizers)
        self._checkpoint = tf.train.Checkpoint(
            model=named_variables(self.model.weights),
            optimizer=named_variables(moments),
            step=self.step,
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(run.checkpoints), config.training.checkpoints_kept
        )
        newest = run.latest_checkpoint() if resume else None
        if newest:
            with intact_checkpoint(newest, f"the checkpoint of {run.config_path}"):
                self._checkpoint.restore(newest).assert_consumed()
        self._evaluate = tf.function(self._test_step)
        self._reconstruct = tf.function(self.model.reconstruct)
        self._stopped_by, self._all_stop, self._saved_at = None, False, time.monotonic()

    def fit(self, *, started: Callable[[], None] | None = None) -> int | None:
        """Train to the end, or until Ctrl-C or SIGTERM; either way the last step is saved.

        Args:
            started: called after the first step.

        Returns:
            The number of the signal that ended the training, or None.

        Raises:
            NonFiniteLossError: naming the step and the terms; the last good checkpoint is kept.
            WorkerLostError: if another process of the training died.
        """
        start, total = int(self.step.numpy()), self.config.training.steps
        chief, logs = self.placement.chief, None
        bar = {"desc": "training", "unit": "step", "disable": not chief}
        try:
            with (
                contextlib.ExitStack() as after,
                tqdm(total=total, initial=start, **bar) as progress,
            ):
                for number in (signal.SIGINT, signal.SIGTERM):
                    after.callback(signal.signal, number, signal.signal(number, self._stop))
                if chief:
                    logs = after.enter_context(_Logs(self.run, start=start, grid=self.model.grid))
                    if start == 0:
                        logs.write("test_losses", 0, self.test_losses())
                for rows, images in batches(self.train_cache, self.config, start, self.placement):
                    self._one_step(rows, images, logs, progress)
                    if started is not None:
                        started, _ = None, started()
                    if self._all_stop or (self._stopped_by and self.placement.workers == 1):
                        break
        except WORKER_ERRORS as error:
            if self.placement.workers == 1:
                raise
            raise WorkerLostError(
                f"Training stopped after step {int(self.step.numpy())}: a worker is gone "
                f"({type(error).__name__}). The last checkpoint is "
                f"{self._manager.latest_checkpoint or 'none'}; start all workers again, to resume."
            ) from error
        self.save()
        return self._stopped_by

    def save(self) -> None:
        """Write a checkpoint of weights, optimizer and step, unless there is one of this step."""
        if not self.placement.chief:
            return
        step = int(self.step.numpy())
        newest = self._manager.latest_checkpoint
        if newest is None or not newest.endswith(f"-{step}"):
            with writing(self.run.checkpoints):
                self._manager.save(checkpoint_number=step)
        self._saved_at = time.monotonic()

    def test_losses(self) -> dict[str, float]:
        """Terms of the loss on fixed test slices with fixed noise, means over slices, by name."""
        rows = _fixed_rows(self.test_cache, TEST_SLICES)
        size = self.config.training.batch_size
        sums = {}
        for chunk in np.array_split(rows, -(-len(rows) // size)):
            images = tf.constant(self.test_cache.read(chunk))
            terms = self._evaluate(images, tf.constant(chunk, tf.int64))
            for name, values in terms.items():
                sums[name] = sums.get(name, 0.0) + float(tf.reduce_sum(values))
        return {name: value / len(rows) for name, value in sums.items()}

    def _stop(self, number, _frame):
        self._stopped_by = number

    def _one_step(self, rows, images, logs, progress):
        step = int(self.step.numpy())
        losses = self.update(images, rows, stopping=self._stopped_by is not None)
        # Processes that work together stop after the same step, whichever was asked to.
        self._all_stop = losses.pop(STOPPING) > 0
        if self._all_stop:
            self._stopped_by = self._stopped_by or signal.SIGTERM
        limited = self.config.training.gradient_norm_limit is not None  # a bad one was left out
        checked = [
            v for name, v in losses.items() if not (limited and name.startswith(GRADIENT_NORM))
        ]
        if not np.isfinite(checked).all():
            terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            kept = self._manager.latest_checkpoint or "none"
            raise NonFiniteLossError(
                f"Training stopped at step {step}: a loss is not finite ({terms}). The last good "
                f"checkpoint is {kept}. A lower learning rate may help."
            )
        progress.update()
        if logs is not None:
            self._report(step + 1, losses, logs, progress)

    def _report(self, done, losses, logs, progress):
        training = self.config.training
        last = done == training.steps
        if done % training.log_every == 0 or last:
            shown = list(losses.items())[:TERMS_SHOWN]
            progress.set_postfix({name: f"{value:.4g}" for name, value in shown})
            logs.write("losses", done, losses)
        if done % training.test_every == 0 or last:
            logs.write("test_losses", done, self.test_losses())
        if done % training.picture_every == 0 or last:
            logs.picture(done, *self._reconstructions())
        late = time.monotonic() - self._saved_at > SAVE_SECONDS
        if done % training.checkpoint_every == 0 or late:
            self.save()

    def _test_step(self, images, rows):
        if not self.config.training.corruption:  # else there would be nothing to undo
            return self.model.terms(images, self.update.noise(rows, 0, "test"))
        images, noise, shown = self.update.augmented(images, rows, 0, "test")
        return self.model.terms(images, noise, **shown)

    def _reconstructions(self):
        rows = _fixed_rows(self.test_cache, self.config.training.num_pictures)
        images = self.test_cache.read(rows)
        return images, self._reconstruct(images, self.update.noise(rows, 0, "test")).numpy()


class _Logs(contextlib.ExitStack):
    """CSV files, TensorBoard and pictures of one run; rows after the resumed step are dropped."""

    def __init__(self, run, *, start, grid):
        super().__init__()
        self._folder, self._start = run.folder, start
        self._positions = grid[0] * grid[1]
        self._board = tf.summary.create_file_writer(str(run.folder / "tensorboard"))
        self.callback(self._board.close)
        self._writers = {}

    def write(self, name, step, losses):
        """Append a row: every loss as it is, and the nats per position of a latent grid."""
        row = {"step": step, **losses}
        for term, value in losses.items():
            if self._positions > 1 and not term.startswith(GRADIENT_NORM):
                row[f"{term}_per_position"] = value / self._positions
        if name not in self._writers:
            self._writers[name] = self._csv(self._folder / f"{name}.csv", list(row))
        self._writers[name].writerow(row)
        with self._board.as_default():
            for term, value in row.items():
                if term != "step":
                    tf.summary.scalar(f"{name}/{term}", value, step=step)

    def picture(self, step, images, reconstructions):
        """Save test slices above their reconstructions, as PNG and to TensorBoard."""
        rows = [np.concatenate(list(stack[..., 0]), axis=0) for stack in (images, reconstructions)]
        # [X, Y] slices: transposed and flipped, anterior is up and left is left.
        montage = np.concatenate([row.T[::-1] for row in rows], axis=0)
        pixels = np.round(255 * np.clip(montage, 0, 1)).astype(np.uint8)[..., None]
        folder = self._folder / "pictures"
        folder.mkdir(exist_ok=True)
        picture = tf.io.encode_png(pixels).numpy()
        (folder / f"reconstructions-{step:07d}.png").write_bytes(picture)
        with self._board.as_default():
            tf.summary.image("reconstructions", pixels[None], step=step)

    def _csv(self, path, columns):
        """A writer of rows that are on disk at once, after those of before the resumed step."""
        kept = []
        if self._start and path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= self._start]
        file = self.enter_context(path.open("w", encoding="utf-8", newline="", buffering=1))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
        return writer

"""Bytes that come and go in an update that is made layer by layer (`peft_pretraining.accumulation`).

A moment has one layer, its sums of gradients and what it keeps of one micro-batch, or the head, or the embeddings. The
weights of a layer are dequantized for all micro-batches while a pass is made, and are gone when it is updated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from peft_pretraining.accumulation.hidden_states import BUFFERS_OF_A_MICRO_BATCH
from peft_pretraining.accumulation.layer_by_layer import cached_matrices
from peft_pretraining.memory.lasting import sum_bytes
from peft_pretraining.memory.passing import ROWS_OF_ALL, PassingBytes
from peft_pretraining.memory.planned_run import Matrix, PlannedRun
from qgalore.graphs.dequant_cache import CACHE_BYTES
from qgalore.layer.layout import padded_width
from qgalore.update.directions import DIRECTIONS


class PassingByLayer(PassingBytes):
    """The phases of one run's update with `--accumulate_by layer`."""

    def __init__(self, run: PlannedRun) -> None:
        """What a layer has dequantized, and what it keeps of a micro-batch beside its input, which is in a buffer."""
        super().__init__(run)
        cached = cached_matrices([x.shape for x in run.matrices], run.dtype)
        dequantizes = self.quantized and not self.format.fp8_products
        sizes = [self.itemsize * math.prod(map(padded_width, x.shape)) * dequantizes for x in run.matrices]
        self.dequantized, self.stays_dequantized = sum(sizes), sum(sizes[:cached])
        """In the forward pass of a layer, and in its backward pass."""
        bases = self.itemsize * sum(x.bases for x in run.matrices) * self.options.proj_quant
        self.weights = 0  # which `backward` would count, and with it no other
        self.bases = bases if bases <= CACHE_BYTES else 0
        self.kept = self.layer()

    def phases(self) -> dict[str, int]:
        """See `PassingBytes`."""
        run, config = self.run, self.run.config
        of_table, update = self._sum(config.vocab_size, config.hidden_size), self.update_of_table()
        loss = self.loss(stays=run.args.batch.gradient_accumulation > 1)
        of_layer = self.sums_of_layer()
        # A sum that gets its second gradient is there in both dtypes for a moment.
        widened = self.table if run.args.updates_immediately and run.sum_dtype.itemsize > self.itemsize else 0
        summed = 2 * self.hidden + self.table * (1 + run.gathers_tables) + widened
        backward = self.stays_dequantized + self.kept + self.backward(recomputed=False)
        found = {
            "forward of one layer": self.dequantized + self.kept + self.hidden,
            "loss and sum of the head's gradients": max(loss, summed) + of_table,
            "update of the head": update + of_table,
            "backward of one layer and its sums": backward + of_layer,
            "sum of the embeddings' gradients": self.hidden + self.table + widened + of_table,
        }
        if rows := self.rows_of_embeddings():
            found[ROWS_OF_ALL] = self.read_of_table() + of_table + rows
        if run.args.updates_immediately:
            found["update of one layer"] = self._update_of_layer(of_layer)
        else:
            found["update of the largest weight"] = max(self.updates(), update)
        return found

    def overhead(self) -> dict[str, int]:
        """Hidden states on their way between host and device, with token ids and labels of all micro-batches."""
        buffers = BUFFERS_OF_A_MICRO_BATCH * self.hidden if self.run.cuda else 0
        ids = 16 * self.run.tokens * self.run.args.batch.gradient_accumulation
        return {"hidden states on their way, token ids": buffers + ids}

    def host(self) -> int:
        """The outputs of all layers for all micro-batches, in host memory."""
        return self.layers * self.run.args.batch.gradient_accumulation * self.hidden

    def _update_of_layer(self, sums: int) -> int:
        """At most, while its matrices are updated in batches, each of which then gives up its sums of gradients."""
        if not self.run.args.optimizer.is_low_rank:
            return sums + self.updates()
        most = 0
        for batch in self._batches():
            values, largest = sum(x.gradient for x in batch), max(x.gradient for x in batch)
            # A sum in INT8 is made whole for it; over ranks others are sent from where they are.
            read = 4 * values if self.int8_sums else 0
            steps = self.directions(values, largest, len(batch), cached=False) + max(map(self._applying, batch))
            most = max(most, sums + read + max(steps, *map(self.refresh, batch)))
            sums -= sum(self._sum(*x.gradient_shape) for x in batch)
        return most

    def _batches(self) -> Iterator[list[Matrix]]:
        """The matrices of a layer that are updated at once (`qgalore.update.step`); over ranks one after the other."""
        limit = DIRECTIONS[self.options.direction].batch_values if self.run.args.world_size == 1 else 0
        batch: list[Matrix] = []
        for matrix in self.run.matrices:
            batch.append(matrix)
            if sum(x.gradient for x in batch) > limit:
                yield batch
                batch = []
        if batch:
            yield batch

    def sums_of_layer(self) -> int:
        """Of one layer, with those that refresh subspaces; none that are kept for `step`, which are counted there."""
        run = self.run
        gradients = sum(self._sum(*x.gradient_shape) + self.itemsize * x.residual for x in run.matrices)
        due = min(math.ceil(self.layers * len(run.matrices) / self.options.shortest_interval), len(run.matrices))
        largest = max(run.matrices, key=lambda x: x.size)
        of_refresh = sum(self._sum(largest.rank, side) for side in largest.sides)
        if self.options.subspace == "svd" and largest.sides:
            of_refresh = self._sum(*largest.shape)
        return gradients + due * of_refresh if run.args.updates_immediately else 0

    def _sum(self, *shape: int) -> int:
        return sum_bytes(self.run, shape) if self.run.args.updates_immediately else 0

"""The floors: counts by hand on a tiny model, and what must hold for any."""

from dataclasses import replace

import pytest

from benchmarks import floor, models
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.speed import update_passes
from peft_pretraining.speed.passes import (
    FP8_SPEED,
    INT8_SPEED,
    Ceilings,
    Pass,
    moved,
    product,
    product_in_fp8,
    quantized_bytes,
    seconds,
)
from peft_pretraining.speed.update_passes import Setting, adamw, all_passes, q_galore
from qgalore.config import FP8_GRADIENTS, FP8_PRODUCTS, INT8_PRODUCTS

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)
TINY = Setting(CONFIG, micro_batch=2, rank=4, length=4)
TOKENS = 8
DECODER, HEAD = 4 * 16 * 16 + 3 * 16 * 32, 64 * 16  # values
SCORES = 2 * 2 * (1 + 2 + 3 + 4)  # sequences, heads, positions that attend to positions
TARGETS = [s for model in floor.TARGETS for s in floor.settings(model)]
METHODS = (q_galore, adamw)


def operations(passes: list[Pass]) -> float:
    return sum(p.operations for p in passes)


def test_full_training_takes_six_operations_a_weight_and_token() -> None:
    attention = 7 * 2 * 8 * SCORES  # two products forward and five backward over a head of 8
    assert operations(all_passes(adamw(TINY))) == 6 * TOKENS * (DECODER + HEAD) + attention


def test_checkpointing_computes_again_all_but_down_proj() -> None:
    update = adamw(replace(TINY, checkpointing=True))
    assert operations(update.pop(update_passes.RECOMPUTE)) == 2 * TOKENS * (DECODER - 16 * 32) + 2 * 2 * 8 * SCORES
    assert update == adamw(TINY)


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    assert product(2, 3, 5) == Pass(2 * 2 * 3 * 5, 2 * (2 * 3 + 3 * 5 + 2 * 5))


def test_products_of_8_bits_by_hand() -> None:
    """Four inputs are rounded (queries, keys and values share one, gate and up another), and seven gradients."""
    s = replace(TINY, products=INT8_PRODUCTS)
    values = [16 * 16] * 4 + [16 * 32] * 3
    forward = q_galore(s)[update_passes.FORWARD]
    assert operations(forward) == pytest.approx(2 * TOKENS * DECODER / INT8_SPEED)
    rounded, factors = 3 * TOKENS * (16 + 16 + 16 + 32), sum(values) + TOKENS * (6 * 16 + 32)
    assert sum(p.nbytes for p in forward) == rounded + factors + 2 * TOKENS * (5 * 16 + 2 * 32)
    backward = q_galore(s)[update_passes.INPUT_GRADIENTS]
    rounded, factors = 3 * TOKENS * (5 * 16 + 2 * 32), sum(values) + TOKENS * (5 * 16 + 2 * 32)
    assert sum(p.nbytes for p in backward) == rounded + factors + 2 * TOKENS * (6 * 16 + 32)
    # In FP8 queries, keys and values have one product, and gate and up: three results fewer, and as many read less.
    fp8 = q_galore(replace(s, products=FP8_PRODUCTS))
    in_bfloat16 = [speed * operations(found) for speed, found in (
        (FP8_SPEED, fp8[update_passes.INPUT_GRADIENTS]), (INT8_SPEED, backward),
    )]  # fmt: skip
    assert in_bfloat16[0] == pytest.approx(in_bfloat16[1])
    fewer = [sum(p.nbytes for p in passes) for passes in (backward, fp8[update_passes.INPUT_GRADIENTS])]
    assert fewer[0] - fewer[1] == 2 * TOKENS * 3 * 16
    between = [sum(p.nbytes for p in found[update_passes.POINTWISE]) for found in (q_galore(s), fp8)]
    # And what norms and SwiGLU make is written in a byte, with nothing left to round but attention's output.
    assert between[0] - between[1] == 2 * TOKENS * 3 * 16 + TOKENS * (16 + 16 + 32)
    rounding = [sum(p.nbytes for p in found[update_passes.FORWARD]) for found in (q_galore(s), fp8)]
    assert rounding[0] - rounding[1] == 3 * TOKENS * (16 + 16 + 32)
    # A weight is read as it is stored, one group a row, and written in a byte a value; bases as ever.
    weights, bases = (sum(16 * p for p in (16, 16, 16, 16, 32, 32, 32)), q_galore(TINY)[update_passes.DEQUANTIZE])
    found = q_galore(s)[update_passes.DEQUANTIZE]
    assert sum(p.nbytes for p in bases) - sum(p.nbytes for p in found) == 2 * weights
    assert adamw(s) == adamw(TINY)


def test_the_result_of_a_product_in_fp8_is_written_after_its_sum() -> None:
    """Of a long sum the result is little; of a short one the operands' bytes may take longer than both."""
    ceilings = Ceilings(operations_per_second=10.0, bytes_per_second=100.0)
    assert seconds([product_in_fp8(2, 50, 3)], ceilings) == pytest.approx(
        2 * 2 * 50 * 3 / FP8_SPEED / 10 + 2 * 2 * 3 / 100
    )
    assert seconds([product_in_fp8(100, 1, 1)], Ceilings(1e9, 100.0)) == pytest.approx((100 + 1 + 200) / 100, rel=1e-6)


def test_a_head_in_fp8_by_hand() -> None:
    """Of one chunk: its weight twice, hidden states, the codes of the logits' gradient, a result that is copied."""
    s = replace(TINY, products=FP8_PRODUCTS, head_products=FP8_PRODUCTS)
    vocabulary, hidden = s.config.vocab_size, s.config.hidden_size
    plain, found = (q_galore(each)[update_passes.HEAD] for each in (TINY, s))
    assert operations(found) == pytest.approx(operations(plain) * (2 / FP8_SPEED + 1) / 3)
    rounding = 8 * vocabulary * hidden + TOKENS * (3 * hidden + vocabulary) + 4 * TOKENS * hidden
    spared = vocabulary * hidden * 2 + TOKENS * (hidden + vocabulary)  # bytes of the factors of both products
    assert sum(p.nbytes for p in found) - sum(p.nbytes for p in plain) == rounding - spared
    both = q_galore(replace(s, head_products=FP8_GRADIENTS))[update_passes.HEAD]
    assert operations(both) == pytest.approx(operations(plain) / FP8_SPEED)


def test_a_quantized_row_has_two_numbers_a_group() -> None:
    assert quantized_bytes(3, 257, 8) == 3 * (257 + 2 * 4)
    assert quantized_bytes(3, 257, 4) == 3 * (129 + 2 * 4)


def test_adamw_moves_seven_bfloat16_values_a_weight() -> None:
    update = adamw(TINY)
    assert sum(p.nbytes for p in update[update_passes.ADAM] + update[update_passes.TABLES]) == 14 * (DECODER + 2 * HEAD)


def test_our_update_of_a_matrix_by_hand() -> None:
    # q_proj is (16, 16): its gradient is (16, 4), its basis (4, 16); one group a row.
    grad, states = 2 * 16 * 4, 16 * 4 + 4  # bytes
    assert update_passes.adam8bit(16, 4, grad, result_bytes=2) == [
        moved(grad),
        moved(grad + 2 * 2 * states + 2 * 16 * 4),
    ]
    assert update_passes.project_back(TINY, 16, 16) == Pass(2 * 16 * 16 * 4, 2 * 4 * (16 + 16) + 2 * 16 * (16 + 4))
    # Three sums in INT8: three gradients read, the sum written three times and read twice.
    assert update_passes.gradient_sums(16, 4, 3) == [moved(3 * grad + 5 * 16 * (4 + 4))]
    assert update_passes.gradient_sums(16, 4, 1) == []


def test_passes_run_one_after_another_and_each_takes_the_longer_of_its_times() -> None:
    assert seconds([Pass(10, 1), Pass(1, 30)], Ceilings(1, 2)) == 10 + 15
    assert seconds([Pass(10, 1), Pass(1, 30, kernels=3)], Ceilings(1, 2, seconds_per_kernel=2)) == 10 + 15 + 2 + 6


@pytest.mark.parametrize("s", TARGETS)
def test_checkpointing_takes_longer(s: Setting) -> None:
    for method in METHODS:
        with_it, without = (seconds(all_passes(method(replace(s, checkpointing=c))), Ceilings()) for c in (True, False))
        assert with_it > without


@pytest.mark.parametrize("s", TARGETS)
def test_projected_gradients_take_fewer_operations_than_full_ones(s: Setting) -> None:
    assert operations(q_galore(s)[update_passes.WEIGHT_GRADIENTS]) < operations(
        adamw(s)[update_passes.WEIGHT_GRADIENTS]
    )


def test_direct_projection_by_formula() -> None:
    s = floor.settings("7b")[0]  # large enough that every matrix is projected directly
    sides = 4 * (4096 + 4096) + 3 * (11008 + 4096)
    assert operations(q_galore(s)[update_passes.WEIGHT_GRADIENTS]) == 32 * 2 * 4096 * 1024 * sides


def test_products_that_the_library_joins_move_less_and_multiply_as_much() -> None:
    small, large = floor.settings("60m")[0], floor.settings("7b")[0]
    values = 2 * small.tokens * 512  # bytes of one activation of the residual stream
    apart, joined = update_passes.decoder_products(small), update_passes.input_gradients(small)
    assert operations(apart) == operations(joined)
    assert sum(p.nbytes for p in apart) - sum(p.nbytes for p in joined) == values, "one result instead of two"
    assert update_passes.input_gradients(large) == update_passes.decoder_products(large)
    forward, backward = (sum(p.nbytes for p in update_passes.pointwise(small, j)[1]) for j in (True, False))
    assert backward - forward == values, "which the norm's gradient reads"
    # 60M: whole gradients of queries and keys by one product, and gate and up projected by one.
    t, r, inner = small.tokens, 128, 1376
    whole = [product(2 * 512, t, 512), *[product(512, 512, r)] * 2, *[product(512, t, 512), product(512, 512, r)] * 2]
    direct = [product(t, 512, 2 * r), *[product(inner, t, r)] * 2, product(t, 512, r), product(inner, t, r)]
    assert update_passes.projected_gradients(small) == whole + direct
    # 130M: all of them directly, three by one product.
    middle = floor.settings("130m")[0]
    assert update_passes.projected_gradients(middle)[:4] == [
        product(middle.tokens, 768, 3 * 256),
        *[product(768, middle.tokens, 256)] * 3,
    ]


def test_micro_batches_share_an_update() -> None:
    for method in METHODS:
        one, four = (seconds(all_passes(method(replace(TARGETS[0], grad_accum=n))), Ceilings()) for n in (1, 4))
        assert one < four
        assert update_passes.SUMS not in method(TARGETS[0])
    one, many = floor.settings("7b")
    assert seconds(all_passes(q_galore(many)), Ceilings()) < 32 * seconds(all_passes(q_galore(one)), Ceilings())


def test_the_loss_in_chunks_multiplies_as_much_and_moves_more() -> None:
    s = TARGETS[0]
    chunked, whole = update_passes.chunked_head(s), update_passes.whole_head(s)
    assert len(chunked) > len(update_passes.chunked_head(TINY))
    assert operations(chunked) == operations(whole)
    products = [sum(p.nbytes for p in passes if p.operations) for passes in (chunked, whole)]
    assert products[0] > products[1]


def test_targets_are_those_that_are_measured() -> None:
    for model, targets in floor.TARGETS.items():
        assert {target[:2] for target in targets} == {(models.MICRO_BATCHES[model], models.RANKS[model])}


def test_the_program_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    def floors(*argv: str) -> list[float]:
        assert floor.main(["--models", "60m,7b", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("| component") for line in lines) == 3
        return [float(line.split("|")[6].replace(",", "")) for line in lines if line.startswith(("| 60M", "| 7B"))]

    slow, fast = floors(), floors("--tflops", "1580", "--tbps", "6")
    assert len(slow) == 4
    assert fast == pytest.approx([time / 2 for time in slow], abs=0.11)
    with pytest.raises(SystemExit):
        floor.main(["--models", "61m"])

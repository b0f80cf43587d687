"""A model as data: slots, shapes and choices survive JSON, reshape as asked, and count their weights right."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import families, kinds
from pennyweight.formats import packed_int
from pennyweight.model.choices import PARENT, Choice, layout_to_json
from pennyweight.model.shapes import (
    Attention,
    Dense,
    Embedding,
    GatedMLP,
    Head,
    MoE,
    Noop,
    Norm,
    Shape,
    Weight,
    parameters,
)
from pennyweight.model.slots import Slot
from pennyweight.model.stored import fitting
from pennyweight.variants import choice_from_json, layout_from_json, reshape, reshape_all, structural

AXES = kinds.names("variants")
ATTENTION = Attention(hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=48, qkv_bias=True, sinks=True)
MLP = GatedMLP(hidden_size=256, intermediate_size=1024, bias=True)
SHAPES: list[Shape] = [
    ATTENTION,
    Attention(hidden_size=257, num_heads=6, num_kv_heads=6, head_dim=63, window=128, qk_norm="each head", o_bias=True),
    Attention(hidden_size=64, num_heads=4, num_kv_heads=1, head_dim=16),
    MLP,
    GatedMLP(hidden_size=63, intermediate_size=257),
    GatedMLP(hidden_size=1, intermediate_size=1),
    MoE(hidden_size=64, intermediate_size=32, num_experts=16, top_k=2, bias=True, router_bias=True),
    Dense(hidden_size=256),
    Noop(hidden_size=256),
    Embedding(vocab_size=257, hidden_size=256),
    Norm(hidden_size=256),
    Head(vocab_size=257, hidden_size=256),
    Head(vocab_size=257, hidden_size=256, tied=True),
]


def through_json(choice: Choice) -> Choice:
    return choice_from_json(json.loads(json.dumps(choice.to_json())))


def offered(shape: Shape) -> list[tuple[str, object]]:
    return [(axis, spec) for axis in AXES for spec in kinds.load("variants", axis).options(shape)]


sizes = st.integers(1, 600)
attentions = st.builds(
    lambda kv, per_kv, window, flags, norm, norms, hidden, dim: Attention(
        hidden_size=hidden,
        num_heads=kv * per_kv,
        num_kv_heads=kv,
        head_dim=dim,
        window=window,
        qk_norm=norm,
        norms=norms,
        **dict(zip(("qkv_bias", "o_bias", "sinks"), flags, strict=True)),
    ),
    st.integers(1, 16),
    st.integers(1, 8),
    st.none() | st.integers(1, 10_000),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([None, "each head", "all heads"]),
    st.sampled_from(["before", "after", "both"]),
    sizes,
    sizes,
)
shapes = st.one_of(
    attentions,
    st.builds(GatedMLP, hidden_size=sizes, intermediate_size=sizes, bias=st.booleans()),
    st.builds(Dense, hidden_size=sizes),
    st.builds(Embedding, vocab_size=sizes, hidden_size=sizes, tied=st.booleans()),
    st.builds(Head, vocab_size=sizes, hidden_size=sizes, tied=st.booleans()),
)


# ---------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("text", ["embed", "0.mixer", "7.mixer", "63.ffn", "257.ffn", "norm", "head"])
def test_a_slot_is_what_it_prints(text):
    assert str(Slot.parse(text)) == text


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(["mixer", "ffn"]), st.integers(0, 10_000))
def test_a_printed_slot_reads_back(kind, layer):
    assert Slot.parse(str(Slot(kind, layer))) == Slot(kind, layer)


@pytest.mark.parametrize(
    "text",
    ["", "ffn", "mixer", "7.embed", "0.head", ".ffn", ".embed", "x.ffn", "-1.ffn", "7.", "7.7.ffn", "7.mlp", "Embed"],
)
def test_what_is_no_slot_is_refused_with_examples(text):
    with pytest.raises(ValueError) as err:
        Slot.parse(text)
    assert str(err.value) == f"{text!r} is not a slot; slots are written embed, 7.mixer, 7.ffn, norm, head"


# -------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_every_offered_spec_survives_json_and_fits_its_shape(shape):
    for axis, spec in offered(shape):
        choice = Choice(((axis, spec),))
        assert through_json(choice) == choice
        assert through_json(choice).key() == choice.key()
        assert str(choice) == str(spec) != ""
        assert axis in choice
        assert choice[axis] == spec
        resulting = reshape(shape, choice)
        assert isinstance(resulting, Shape)
        assert resulting != shape, f"{choice} changes nothing"
        assert resulting.hidden_size == shape.hidden_size, "the residual stream keeps its width"


@settings(deadline=None, derandomize=True, max_examples=150)
@given(shapes)
def test_so_does_every_spec_offered_for_a_shape_nobody_thought_of(shape):
    specs = offered(shape)
    assert len(set(specs)) == len(specs)
    for axis, spec in specs:
        choice = Choice(((axis, spec),))
        assert through_json(choice) == choice
        reshape(shape, choice)


def test_every_axis_offers_something_for_some_shape():
    assert {axis for shape in SHAPES for axis, _ in offered(shape)} == set(AXES)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(shapes, st.data())
def test_specs_of_several_axes_keep_their_order_through_json(shape, data):
    specs, current = [], shape
    for axis in ("kv_heads", "ffn_width", "window", "bits"):
        options = kinds.load("variants", axis).options(current)
        if options and data.draw(st.booleans()):
            specs.append((axis, data.draw(st.sampled_from(options))))
            current = reshape(current, Choice((specs[-1],)))
    choice = Choice(tuple(specs))
    assert through_json(choice) == choice
    assert reshape(shape, choice) == current
    assert bool(choice) == bool(specs)
    assert structural(choice) == Choice(tuple(item for item in specs if item[0] != "bits"))


def test_equal_choices_have_equal_keys_and_others_do_not():
    choices = [Choice((item,)) for shape in SHAPES for item in offered(shape)]
    assert len({choice.key() for choice in choices}) == len(set(choices)) > len(AXES)


def test_no_choice_is_the_parent():
    assert not PARENT
    assert str(PARENT) == "parent"
    assert reshape(MLP, PARENT) is MLP
    assert through_json(PARENT) == PARENT


def test_a_choice_of_an_unknown_axis_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"there is no variants called 'depth'; there are: {', '.join(AXES)}"):
        choice_from_json({"depth": {"layers": 3}})


def test_a_choice_with_unknown_fields_is_refused():
    with pytest.raises(TypeError, match="depth"):
        choice_from_json({"ffn_width": {"width": 64, "depth": 3}})


def test_a_layout_survives_json_and_leaves_the_parent_s_choices_out():
    width = kinds.load("variants", "ffn_width").Spec(512)
    layout = {Slot("mixer", 0): PARENT, Slot("ffn", 0): Choice((("ffn_width", width),))}
    written = json.loads(json.dumps(layout_to_json(layout)))
    assert written == {"0.ffn": {"ffn_width": {"width": 512, "init": "fitted"}}}
    assert layout_from_json(written) == {Slot("ffn", 0): layout[Slot("ffn", 0)]}


# -------------------------------------------------------------------------------------------------------- reshape


def spec(axis: str, *fields: object) -> Choice:
    return Choice(((axis, kinds.load("variants", axis).Spec(*fields)),))


def test_each_axis_changes_what_it_says():
    assert reshape(ATTENTION, spec("kv_heads", 2)) == dataclasses.replace(ATTENTION, num_kv_heads=2)
    assert reshape(ATTENTION, spec("window", 63)) == dataclasses.replace(ATTENTION, window=63)
    assert reshape(MLP, spec("ffn_width", 257)) == dataclasses.replace(MLP, intermediate_size=257)
    assert reshape(MLP, spec("bits", 4, 64)) == dataclasses.replace(MLP, stored=packed_int.Spec(4, 64))
    assert reshape(MLP, spec("noop")) == reshape(ATTENTION, spec("noop")) == Noop(hidden_size=256)
    assert reshape(ATTENTION, spec("linear", "product")) == Dense(hidden_size=256)


@pytest.mark.parametrize(
    ("shape", "choice", "message"),
    [
        (ATTENTION, spec("kv_heads", 3), "3 KV heads do not divide those of Attention"),
        (ATTENTION, spec("kv_heads", 8), "8 KV heads do not divide"),
        (ATTENTION, spec("kv_heads", 0), "0 KV heads do not divide"),
        (MLP, spec("kv_heads", 1), "1 KV heads do not divide those of GatedMLP"),
        (ATTENTION, spec("window", 0), "a window of 0 does not fit Attention"),
        (MLP, spec("window", 64), "a window of 64 does not fit GatedMLP"),
        (MLP, spec("ffn_width", 1025), "FFN width 1025 does not fit GatedMLP"),
        (MLP, spec("ffn_width", 0), "FFN width 0 does not fit"),
        (ATTENTION, spec("ffn_width", 64), "FFN width 64 does not fit Attention"),
        (MLP, spec("bits", 4, 384), "the hidden size of .* is not a multiple of the group 384"),
        (Noop(hidden_size=256), spec("bits", 4, 64), "no matrices to store in 4 bits"),
        (Norm(hidden_size=256), spec("bits", 8, 64), "no matrices to store in 8 bits"),
        (Norm(hidden_size=256), spec("noop"), "Norm.* cannot be taken out"),
        (Head(vocab_size=9, hidden_size=9), spec("linear"), "Head.* cannot become linear"),
    ],
)
def test_a_spec_that_does_not_fit_says_what_came_and_where(shape, choice, message):
    with pytest.raises(ValueError, match=message):
        reshape(shape, choice)


def test_a_second_spec_is_applied_to_what_the_first_one_left():
    both = Choice((*spec("linear", "fitted").specs, *spec("bits", 4, 128).specs))
    assert reshape(MLP, both) == Dense(hidden_size=256, stored=packed_int.Spec(4, 128))
    with pytest.raises(ValueError, match="FFN width 64 does not fit Noop"):
        reshape(MLP, Choice((*spec("noop").specs, *spec("ffn_width", 64).specs)))


def test_slots_without_a_choice_keep_their_shape():
    model = {Slot("mixer", 0): ATTENTION, Slot("ffn", 0): MLP}
    assert reshape_all(model, {Slot("ffn", 0): spec("noop")}) == {
        Slot("mixer", 0): ATTENTION,
        Slot("ffn", 0): Noop(hidden_size=256),
    }


# ------------------------------------------------------------------------------------------------------- counting


def test_parameters_counted_by_hand():
    attention = Attention(
        hidden_size=10, num_heads=6, num_kv_heads=2, head_dim=7, qkv_bias=True, o_bias=True, sinks=True
    )
    matrices = 10 * 42 + 2 * 10 * 14 + 42 * 10  # q; k and v; o
    assert parameters({Slot("mixer", 0): attention}) == 10 + matrices + (42 + 14 + 14) + 10 + 6
    assert parameters({Slot("ffn", 0): GatedMLP(hidden_size=3, intermediate_size=5, bias=True)}) == 3 + 45 + 13
    assert parameters({Slot("ffn", 0): Noop(hidden_size=3)}) == 0
    moe = MoE(hidden_size=3, intermediate_size=5, num_experts=4, top_k=2, bias=True, router_bias=True)
    assert parameters({Slot("ffn", 0): moe}) == 3 + (12 + 4) + 4 * (3 * 15 + 2 * 5 + 3)
    assert parameters({Slot("head"): Head(vocab_size=11, hidden_size=3, tied=True)}) == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 40}),
    ],
)
def test_parameters_are_those_that_transformers_makes(model_type, extra, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=257,
        hidden_size=64,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **extra,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = families.shapes({**config.to_dict(), "model_type": model_type})
    assert parameters(planned) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("columns", [1, 63, 257])
def test_bytes_of_a_matrix(columns):
    assert Weight("q_proj", (5, columns)).nbytes == 2 * 5 * columns
    words = {4: math.ceil(columns / 8), 8: math.ceil(columns / 4)}
    for bits in (4, 8):
        packed = Weight("q_proj", (5, columns), packed_int.Spec(bits, columns))
        assert packed.nbytes == 4 * 5 * words[bits] + 2 * 5 * 1 + 2 * 8  # codes, a scale per row, the shape
    assert Weight("norm", (columns,), packed_int.Spec(4, 32)).nbytes == 2 * columns, "vectors stay at 16 bits"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(shapes)
def test_fewer_bits_never_cost_more_in_matrices_wide_enough_to_be_packed(shape):
    def nbytes(stored: Shape) -> int:
        return sum(weight.nbytes for weight in stored.weights())

    choices = [Choice((item,)) for item in offered(shape) if item[0] == "bits"]
    by_bits = {choice["bits"].bits: nbytes(reshape(shape, choice)) for choice in reversed(choices)}
    if by_bits:
        rows = sum(weight.shape[0] for weight in shape.weights() if len(weight.shape) > 1)
        assert by_bits[4] < by_bits[8]
        assert by_bits[8] < nbytes(shape) or rows < 16  # the packed shape's 16 bytes


@pytest.mark.parametrize(
    ("group", "columns", "wanted"),
    [(128, 768, 128), (128, 704, 64), (128, 736, 32), (32, 48, 48), (128, 172, 172), (48, 96, 48), (172, 344, 172)],
)
def test_a_group_that_does_not_divide_a_row_is_halved_down_to_32_then_a_whole_row(group, columns, wanted):
    assert fitting(group, columns) == wanted
    assert packed_int.Spec(4, group).over(columns).group == wanted


@pytest.mark.parametrize(
    ("width", "offered"),
    [
        (768, [704, 672, 640, 576, 512, 480, 448, 384, 320, 288, 256, 192, 128, 96]),
        (1536, [1408, 1344, 1280, 1152, 1024, 960, 896, 768, 640, 576, 512, 384, 256, 192]),
        (128, [96, 64, 32]),
        (8960, [8384, 7808, 7296, 6720, 6144, 5632, 5056, 4480, 3904, 3328, 2816, 2240, 1664, 1152]),
    ],
)
def test_widths_go_in_steps_of_a_sixteenth_that_a_group_divides(width, offered):
    shape = dataclasses.replace(MLP, intermediate_size=width)
    assert [spec.width for spec in kinds.load("variants", "ffn_width").options(shape)] == offered

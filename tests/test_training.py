"""The torch side of routing, against a plain forward that leaves the layers out (tiny.gold, tiny.decide)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pyfirst.errors import InputError
from pyfirst.recipe import FirstConfig, load_recipe, save_recipe
from pyfirst.training.data import Example, collate
from pyfirst.training.objectives import leave_one_out, start_from
from pyfirst.training.routers import FirstModel, RoutedCache, Routers, find_layers, per_example

MASKS = {"first": [0], "first two": [0, 1], "last": [3], "first and third": [0, 2], "all but one": [0, 1, 3]}
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "gptneox", "olmo2", "llama4", "mixtral"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


def routed(folder, seed: int = 0, **options) -> FirstModel:
    """A tiny model with random routers whose scores lie around one half."""
    net = tiny.load(folder)
    count = net.config.num_hidden_layers
    routers = Routers(count, tiny.WIDTH)
    torch.manual_seed(seed)
    torch.nn.init.normal_(routers.weight, std=0.5)
    torch.nn.init.normal_(routers.bias, std=0.1)
    return FirstModel(net, routers, **options)


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB - 8, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: FirstModel, ids: torch.Tensor, **options):
    """Token ids, logits [B, 8, V] and masks of eight greedy steps."""
    out, keep = model.generate(
        ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), keep


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_cached_generation_is_the_forward_without_the_layers(tmp_path, arch, prefill):
    """The cache's length and the positions hold when layer 0, or nearly all, are skipped."""
    model = routed(tiny.make(arch, tmp_path), prefill=prefill)
    if arch != "mixtral":  # torch's product of grouped experts has no float64
        model.inner.double()  # float32 kernels round by the number of rows: gemma3 by up to 1.01e-4
    ids = prompt_of(9)
    for off in MASKS.values():
        keep = torch.tensor([i not in off for i in range(model.block_count)])
        sequence, logits, used = greedy(model, ids, keep=keep)
        assert used[0].tolist() == keep.tolist()
        model.unwrap()
        truth = tiny.gold(model.inner, keep.int().tolist(), ids[0].tolist(), sequence[0, 9:-1].tolist(), prefill)
        model.wrap()
        assert abs(logits[0].numpy() - truth[8:]).max() < 1e-4, off


def test_in_mid_forward_the_cache_answers_as_transformers_own(folder):
    """To a layer that asks for itself, when the one before it has written the new tokens."""
    answers = []
    for kind in (RoutedCache, DynamicCache):
        cache = kind(config=AutoConfig.from_pretrained(folder))
        new = torch.zeros(1, 2, 3, 16)
        for layer in range(4):
            cache.update(new, new, layer)
        cache.update(new, new, 0)
        answers.append([(cache.get_seq_length(i), cache.get_mask_sizes(3, i)) for i in range(1, 4)])
    assert answers[0] == answers[1] == [(3, (6, 0))] * 3


def test_a_skipped_layer_is_not_run(folder):
    model = routed(folder, prefill="skip")
    runs = []
    model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    greedy(model, prompt_of(5), keep=torch.tensor([False, True, True, True]))
    assert not runs
    model.prefill = "full"
    greedy(model, prompt_of(5), keep=torch.tensor([False, True, True, True]))
    assert len(runs) == 1  # the prompt


def test_masks_that_fit_nothing_are_refused(folder):
    model = routed(folder)
    with pytest.raises(InputError, match="every layer"):
        model.generate(prompt_of(4), keep=torch.zeros(4, dtype=torch.bool), max_new_tokens=2)
    with pytest.raises(InputError, match="4 layers"):
        model.generate(prompt_of(4), keep=torch.ones(5, dtype=torch.bool), max_new_tokens=2)
    model.threshold.fill_(1.0)
    with pytest.raises(InputError, match="threshold"):
        model.generate(prompt_of(4), max_new_tokens=2)


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_decisions_are_the_equation(folder, tmp_path, prefill, norm):
    """Scores and masks equal an independent float64 evaluation; `window` limits what decides in skip."""
    model = routed(folder, prefill=prefill, window=6, protected=[3])
    model.routers.norm = norm
    config = FirstConfig(4, tiny.WIDTH, router_norm=norm, prefill=prefill, window=6, protected=[3])
    weight, bias = (p.detach().numpy() for p in (model.routers.weight, model.routers.bias))
    save_recipe(tmp_path, config, weight, bias)
    seen = set()
    for seed in range(8):
        ids = prompt_of(10, seed)
        keep, scores = model.decide(ids, torch.ones_like(ids))
        mask, truth = tiny.decide(folder, tmp_path, ids[0].tolist())
        assert keep[0].tolist() == mask.tolist()
        assert abs(scores[0].numpy() - truth).max() < 1e-5
        seen.add(tuple(mask.tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_nothing(folder, prefill, side):
    """Also with a prompt that ends in the padding token itself."""
    model = routed(folder, prefill=prefill, window=7)
    rows = [prompt_of(n, n)[0] for n in (5, 11, 8)]
    rows[0][-1] = 2
    shape = (3, 11)
    ids, mask = torch.full(shape, 2), torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(11 - len(row), 11) if side == "left" else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    keep, scores = model.decide(ids, mask)
    for i, row in enumerate(rows):
        alone, truth = model.decide(row[None], torch.ones(1, len(row)))
        assert keep[i].tolist() == alone[0].tolist()
        assert (scores[i] - truth[0]).abs().max() < 1e-5
    assert len(set(map(tuple, keep.tolist()))) > 1
    if side == "left":
        sequences, _, used = greedy(model, ids, attention_mask=mask)
        for i, row in enumerate(rows):
            own, _, _ = greedy(model, row[None])
            assert sequences[i, 11:].tolist() == own[0, len(row) :].tolist()
        assert used.tolist() == keep.tolist()
    mask[1] = 0
    with pytest.raises(InputError, match="row 1"):
        model.decide(ids, mask)


def test_beams_keep_the_mask_of_their_prompt(folder):
    model = routed(folder)
    ids = torch.cat([prompt_of(6, 1), prompt_of(6, 2)])
    together, keep = model.generate(ids, num_beams=3, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for i in range(2):
        alone, own = model.generate(ids[i : i + 1], num_beams=3, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert alone[0].tolist() == together[i].tolist()
        assert own[0].tolist() == keep[3 * i].tolist()


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_beams_keep_a_mask_that_is_forced(folder, prefill):
    model = routed(folder, prefill=prefill)
    ids = torch.cat([prompt_of(6, 1), prompt_of(6, 2)])
    keep = torch.tensor([[True, False, True, True], [True, True, False, True]])
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together, used = model.generate(ids, keep=keep, **options)
    assert used.tolist() == keep.repeat_interleave(3, 0).tolist()
    for i in range(2):
        alone, _ = model.generate(ids[i : i + 1], keep=keep[i], **options)
        assert alone[0].tolist() == together[i].tolist()


@pytest.mark.parametrize("key", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_a_models_own_wishes_for_the_cache_do_not_count(folder, key):
    model = routed(folder)
    expected, _, keep = greedy(model, prompt_of(9))
    model.inner.generation_config.update(**key)
    found, _, used = greedy(model, prompt_of(9))
    assert found.tolist() == expected.tolist()
    assert used.tolist() == keep.tolist()


def test_an_example_without_a_response_counts_as_nothing(folder):
    model, full = routed(folder), Example([5, 6, 7], [8, 9, 2], "a", "")
    alone, both = (model(**collate(each))["loss"].item() for each in ([full], [full, Example([5, 6], [], "a", "")]))
    assert both == pytest.approx(alone / 2)


def test_training_without_any_layer_is_refused(folder):
    model = routed(folder, prefill="skip", threshold=1.0).requires_grad_(False)
    model.layers[1].requires_grad_(True)
    with pytest.raises(InputError, match="every layer"):
        model(**collate([Example([5, 6, 7], [8, 2], "a", "")]))


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_training_forward_is_generation(folder, prefill):
    """The teacher-forced pass gives the logits that cached decoding gives under the routers' own masks."""
    model = routed(folder, prefill=prefill)
    ids = prompt_of(8, 3)
    sequence, logits, keep = greedy(model, ids)
    prompt = torch.ones_like(sequence)
    prompt[:, 8:] = 0
    for gradients in (False, True):  # the straight-through term must not change a value
        with torch.set_grad_enabled(gradients):
            out = model(sequence, torch.ones_like(sequence), prompt)
        assert out["keep"].tolist() == keep.tolist()
        assert (out["logits"][:, 7:-1] - logits).abs().max() < 1e-4
    assert not keep.all()


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_straight_through_is_the_gradient_of_a_gate(folder, prefill):
    """d loss / d mean score is that of g in h + g * (layer(h) - h), taken at the hard g of 0 or 1."""
    model = routed(folder, prefill=prefill, protected=[0])
    model.base.requires_grad_(False)
    with torch.no_grad():
        model.routers.weight.zero_()
        model.routers.bias.copy_(torch.tensor([-1.0, 0.3, -0.2, 0.1]))
    batch = collate([Example([5, 6, 7, 8], [9, 10, 2], "a", ""), Example([50, 60], [70, 2], "a", "")])
    output = model(**batch)
    assert output["keep"].tolist() == [[True, True, False, True]] * 2
    output["loss"].backward()
    model.unwrap()
    gates = torch.tensor([1.0, 1.0, 0.0, 1.0], requires_grad=True)
    routed_tokens = torch.ones_like(batch["labels"]) if prefill == "skip" else 1 - batch["prompt_mask"]

    def blend(index, original):
        def forward(hidden, *args, **kwargs):
            new = original(hidden, *args, **kwargs)
            return hidden + torch.where(routed_tokens[..., None].bool(), gates[index], 1.0) * (new - hidden)

        return forward

    for index, layer in enumerate(model.layers):
        layer.forward = blend(index, layer.forward)
    loss = model(**batch, dense=True)["loss"]
    assert abs(float(loss) - float(output["loss"])) < 1e-5
    loss.backward()
    score = torch.sigmoid(model.routers.bias.detach())
    expected = gates.grad * score * (1 - score)
    expected[0] = 0  # protected
    assert (model.routers.bias.grad - expected).abs().max() < 1e-5
    assert model.routers.bias.grad[1:].abs().min() > 1e-4


def test_a_skipped_layer_may_be_not_finite(folder):
    """NaN in a layer that is off must not come through the choice."""
    model = routed(folder, prefill="skip")
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    ids = torch.cat([prompt_of(6, 1), prompt_of(6, 2)])
    keep = torch.tensor([[True, True, False, True], [True, True, True, True]])
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids), torch.ones_like(ids), keep=keep)["logits"]
    assert torch.isfinite(logits[0]).all()
    assert logits[1].isnan().any()


def test_leave_one_out_finds_the_useless_layer(folder):
    """With the cache after the prompt it equals whole forwards, and the start skips what costs nothing."""
    model = routed(folder)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.layers[2].get_submodule(name).weight.zero_()
    examples = [
        Example(prompt_of(4 + i, i)[0].tolist(), prompt_of(3 + i % 2, 90 + i)[0].tolist(), "a", "") for i in range(5)
    ]
    deltas, features = leave_one_out(model, examples, 2)
    assert deltas[:, 2].abs().max() < 1e-5
    with torch.no_grad():
        keep = torch.tensor([True, False, True, True])
        truth = per_example(model(**collate(examples), keep=keep), 5)
        truth -= per_example(model(**collate(examples), dense=True), 5)
    assert (deltas[:, 1] - truth).abs().max() < 1e-4
    deltas[:, [0, 1, 3]] = 1.0
    start_from(model, deltas, features, keep=0.7)
    for example in examples:
        ids = torch.tensor([example.prompt])
        assert model.decide(ids, torch.ones_like(ids))[0].tolist() == [[True, True, False, True]]


def test_routers_come_back_bit_equal_and_wrong_ones_are_refused(folder, tmp_path):
    model = routed(folder)
    weight, bias = model.routers.weight.detach().numpy(), model.routers.bias.detach().numpy()
    save_recipe(tmp_path, FirstConfig(4, tiny.WIDTH, router_norm="rms"), weight, bias)
    back = load_recipe(tmp_path)
    assert back.weight.tobytes() == weight.tobytes()
    assert back.bias.tobytes() == bias.tobytes()
    with pytest.raises(InputError, match="'training' is"):
        save_recipe(tmp_path, FirstConfig(4, tiny.WIDTH, training=[]), weight, bias)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"6 layers.*4 layers"):
        FirstModel(tiny.load(folder), Routers(6, tiny.WIDTH))
    with pytest.raises(InputError, match="width 32"):
        FirstModel(tiny.load(folder), Routers(4, 32))
    with pytest.raises(InputError, match="layer 4"):
        FirstModel(tiny.load(folder), Routers(4, tiny.WIDTH), protected=[4])


def test_lora_never_lands_on_a_router(folder):
    from peft import LoraConfig, get_peft_model

    base = get_peft_model(tiny.load(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = FirstModel(base, Routers(4, tiny.WIDTH))
    names = list(model.state_dict())
    assert sum("lora_" in n for n in names) == 2 * 7 * 4
    assert sorted(n for n in names if "lora_" not in n) == ["routers.bias", "routers.weight", "threshold"]
    missing = {k: v for k, v in model.state_dict().items() if k != "routers.bias"}
    with pytest.raises(RuntimeError, match=r"routers\.bias"):
        model.load_state_dict(missing)


_TWO = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("kind", "own", "words"),
    [
        ("gemma3n_text", {**_TWO, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4, "laurel_rank": 2,
                          "vocab_size_per_layer_input": 99, "activation_sparsity_pattern": None}, "read one stream"),
        ("gemma4_text", {**_TWO, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4, "global_head_dim": 8,
                         "vocab_size_per_layer_input": 99}, "reuse what others found"),
        ("glm_moe_dsa", {"num_key_value_heads": 2, "q_lora_rank": 8, "indexer_types": ["full", "shared"] * 2,
                         "n_routed_experts": 2, "num_experts_per_tok": 1}, "reuse what others found"),
        ("dory", {**_TWO}, "4 layers 8 times"),
        ("cpmant", {"num_attention_heads": 2, "dim_head": 8, "dim_ff": 32}, r"\[1, 33, 16\]"),
        ("openai-gpt", {"n_embd": 16, "n_layer": 4, "n_head": 2}, "no cache"),
        ("falcon_h1", {"head_dim": 8}, "has hybrid layers"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_left_out_are_refused(kind, own, words):
    """gemma3n's pass on four versions of the hidden state, dory's middle ones run twice, cpmant's read a prompt."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=99, pad_token_id=0, **{**sizes, **own})
    with pytest.raises(InputError, match=words):
        FirstModel(AutoModelForCausalLM.from_config(config).eval(), Routers(4, 16))


def test_layers_are_found_beside_as_many_experts(tmp_path):
    net = tiny.load(tiny.make("mixtral", tmp_path))
    assert find_layers(net) is net.model.layers


_MAPPED = """
import heap, torch
from pyfirst import fit
from pyfirst.training.phases import keep_heap_small

def mapped(room, size):
    fit.rooms = lambda: [fit.Room(100 << 20, ""), fit.Room(room, "")]
    keep_heap_small(1 << 20)
    sizes = [heap.mapped(lambda: torch.empty(size, dtype=torch.uint8)) for _ in range(2)]
    return sizes[-1] >= size  # without a setting glibc maps a size singly until one was freed

print(mapped(17 << 20, 4 << 20), mapped(15 << 20, 8 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_large_blocks_go_back_to_the_system_where_memory_is_scarce():
    """Elsewhere they stay in the heap, for every new mapping costs time."""
    command = [sys.executable, "-c", _MAPPED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.split() == ["False", "True"]

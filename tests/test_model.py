"""The model: its config, the numbers of Llama, cache, arguments, and life inside transformers."""

import copy
import math
import pickle
import random

import pytest
import torch
from small_model import CLOSE, SIZES, make_model, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from model.errors import UsageError
from model.functional import Normalise, Rotate
from model.LMConfig import PRESETS, MiniMindConfig
from model.model_minimind import MiniMindForCausalLM, RMSNorm, rotary_tables
from model.outputs import MiniMindOutput


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def llama(model):
    config = model.config
    names = [*SIZES, "intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings"]
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, tie_word_embeddings=True))
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("minimind2-small", 25_829_888),
        ("minimind2", 104_030_976),
        ("minimind2-moe", 145_029_760),
        ("minimind-v1-small", 26_878_464),
        ("minimind-v1-moe", 113_402_368),
        ("minimind-v1", 108_749_568),
    ],
)
def test_presets(name, parameters):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig.from_preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(PRESETS) == {"minimind2-small", "minimind2", "minimind2-moe"} | {
        f"minimind-v1{end}" for end in ("", "-small", "-moe")
    }


def test_unknown_config_keys_are_refused():
    """Mistake 11."""
    with pytest.raises(UsageError, match="num_hiden_layers, width"):
        MiniMindConfig(num_hiden_layers=4, width=3)
    with pytest.raises(UsageError, match="minimind3"):
        MiniMindConfig.from_preset("minimind3")


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"hidden_size": 100}, "hidden_size 100"),
        ({"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "in pairs"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "6400"}, "vocab_size"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_impossible_configs_are_refused(fields, named):
    with pytest.raises(UsageError, match=named):
        MiniMindConfig(**fields)


def test_config_round_trip(tmp_path):
    config = MiniMindConfig.from_preset(
        "minimind-v1-moe",
        dropout=0.1,
        inference_rope_scaling=True,
        rope_scaling={"type": "yarn", "factor": 8},
        original_max_position_embeddings=340,
    )
    config.save_pretrained(tmp_path)
    again = MiniMindConfig.from_pretrained(tmp_path)
    ours = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    assert {key: again.to_dict()[key] for key in ours} == ours
    assert again.rope_theta == 1e4
    assert again.yarn_parameters() == config.yarn_parameters()
    assert again.yarn_parameters()["original_max_position_embeddings"] == 340


def test_public_config_loads():
    """What the public MiniMind2 folders hold, and what transformers 4 and 5 add."""
    public = {
        "architectures": ["MiniMindForCausalLM"],
        "auto_map": {"AutoConfig": "LMConfig.MiniMindConfig"},
        "aux_loss_alpha": 0.1,
        "bos_token_id": 1,
        "dropout": 0.0,
        "eos_token_id": 2,
        "flash_attn": True,
        "hidden_act": "silu",
        "hidden_size": 768,
        "inference_rope_scaling": False,
        "intermediate_size": 2048,
        "max_position_embeddings": 32768,
        "model_type": "minimind",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "torch_dtype": "float16",
        "transformers_version": "4.48.0",
        "use_moe": False,
        "vocab_size": 6400,
    }
    config = MiniMindConfig(**public)
    assert (config.hidden_size, config.rope_theta, config.tie_word_embeddings) == (768, 1e6, True)


def test_weight_keys():
    dense = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, "num_hidden_layers": 1})).state_dict()
    layer = "model.layers.0."
    assert set(dense) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"{layer}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    moe = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, "num_hidden_layers": 1}, use_moe=True, n_shared_experts=2))
    experts = [f"experts.{e}" for e in range(4)] + [f"shared_experts.{s}" for s in range(2)]
    assert {name for name in moe.state_dict() if ".mlp." in name} == {
        f"{layer}mlp.gate.weight",
        *(f"{layer}mlp.{expert}.{name}_proj.weight" for expert in experts for name in ("gate", "up", "down")),
    }


def test_initialisation():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=256, num_hidden_layers=2, vocab_size=500))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02)
    ids = torch.randint(500, (2, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(500), rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as Llama


def test_logits_and_gradients_equal_llama(model, llama):
    ids = random_ids(2, 33)
    ours, theirs = model(ids, labels=ids), llama(ids, labels=ids)
    assert theirs.logits.std() > 0.1
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss)
    got = torch.autograd.grad(ours.loss, list(model.parameters()))
    wanted = dict(
        zip(dict(llama.named_parameters()), torch.autograd.grad(theirs.loss, list(llama.parameters())), strict=True)
    )
    for name, gradient in zip(dict(model.named_parameters()), got, strict=True):
        torch.testing.assert_close(gradient, wanted[name], **CLOSE)


@pytest.mark.parametrize("flash", [True, False])
def test_half_precision_weights_and_autocast(flash):
    model = make_model(flash_attn=flash)
    ids = random_ids(2, 16)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.token_losses.dtype == torch.float32
    assert (out.logits - exact).abs().max() < 0.1 * exact.std()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half(ids).logits - exact).abs().max() < 0.15 * exact.std()


def test_norm_is_taken_in_float32():
    norm = RMSNorm(64, 1e-5).to(torch.float16)
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # squares overflow float16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_backward_passes_equal_autograd(dtype):
    """RMSNorm and the rotation against the plain formulas, in float64."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(2, 5, 3, 8)
    cos, sin = torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def turn(x, weight):
        a, b = (x * weight).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    ours = {
        norm: lambda x, weight: Normalise.apply(x, weight, 1e-5, dtype),
        turn: lambda x, weight: Rotate.apply(x * weight, torch.cat((cos, cos), -1), sin),
    }
    for formula, own in ours.items():
        inputs = [each.clone().requires_grad_() for each in (x, weight)]
        exact = [each.double().requires_grad_() for each in (x, weight)]
        out, expected = own(*inputs), formula(*exact)
        close = {"atol": 1e-5, "rtol": 1e-5} if out.dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
        torch.testing.assert_close(out.double(), expected, **close)
        for a, b in zip(
            torch.autograd.grad(out, inputs, grad.to(out.dtype)),
            torch.autograd.grad(expected, exact, grad),
            strict=True,
        ):
            torch.testing.assert_close(
                a.double(),
                b,
                **(close if a.dtype == torch.float32 and dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}),
            )


def test_dropout_in_training_only():
    model = make_model(dropout=0.5)
    ids = random_ids(1, 20)
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_every_dropout_site():
    """Embeddings, the result of attention and of the feed-forward: half the numbers zero, the others doubled."""
    model = make_model(dropout=0.5).train()
    ids = random_ids(4, 50)

    def dropped(out, kept):
        """Whether about half of `out` is 0 and the rest twice what it was."""
        zero = out == 0
        torch.testing.assert_close(out[~zero], 2 * kept.expand_as(out)[~zero])
        return 0.4 < zero.float().mean() < 0.6

    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids)
    handle.remove()
    assert dropped(seen[0], model.model.embed_tokens(ids))
    block, x, ones = model.model.layers[1], torch.zeros(4, 50, 64), torch.ones(4, 50, 64)
    for site, other in ((block.self_attn, block.mlp), (block.mlp, block.self_attn)):
        site.forward, other.forward = lambda *_: ones, lambda *_: torch.zeros(4, 50, 64)
        assert dropped(block(x, None)[0], ones)


@torch.no_grad()
@pytest.mark.parametrize("way", ["flash", "plain", "documents", "mask"])
def test_dropout_of_attention(way):
    """Tokens that are all the same attend to a mean of equal values: rows differ only where weights are dropped."""
    attention = make_model(dropout=0.5, flash_attn=way != "plain").model.layers[0].self_attn
    x = torch.randn(1, 1, 64).expand(2, 30, 64)
    rotary = rotary_tables(MiniMindConfig(**SIZES), torch.arange(30)[None], torch.float32)
    keys = {
        "documents": {"bounds": torch.tensor([0, 12, 30, 60])},
        "mask": {"mask": torch.ones(30, 30, dtype=torch.bool).tril()[None, None]},
    }.get(way, {})
    out = attention(x, rotary, **keys)
    torch.testing.assert_close(out, out[:1, :1].expand_as(out), **CLOSE)
    out = attention.train()(x, rotary, **keys)
    assert (out - out[:1, :1]).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("flash", [True, False])
def test_any_split_over_a_cache_equals_one_forward(padded, flash):
    """Mistake 2: a causal mask for as many keys as queries."""
    model = make_model(flash_attn=flash)
    ids = random_ids(3, 14)
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14, [1] * 3 + [0] * 2 + [1] * 4 + [2] * 5]) if padded else None
    full = model(ids, attention_mask=mask).logits
    real = torch.ones(3, 14, dtype=torch.bool) if mask is None else mask > 0
    chance = random.Random(0)
    for sizes in [[1] * 14, [13, 1], [1, 13], *([chance.randint(1, 6) for _ in range(14)] for _ in range(4))]:
        cache, end, pieces = DynamicCache(config=model.config), 0, []
        for size in sizes:
            part = slice(end, min(end + size, 14))
            if part.start < 14:
                end = part.stop
                past_mask = None if mask is None else mask[:, :end]
                pieces.append(model(ids[:, part], attention_mask=past_mask, past_key_values=cache).logits)
        assert cache.get_seq_length() == 14
        torch.testing.assert_close(torch.cat(pieces, 1)[real], full[real], **CLOSE)


def test_outputs_are_objects_of_their_own(model):
    """Mistake 3: one output object that every call overwrites."""
    first = model(random_ids(1, 5))
    kept = first.logits.clone()
    second = model(random_ids(1, 5, seed=1), use_cache=True)
    assert first is not second and torch.equal(first.logits, kept)
    assert model(random_ids(1, 5), use_cache=False).past_key_values is None
    assert isinstance(second.past_key_values, DynamicCache)
    assert isinstance(first.past_key_values, DynamicCache)  # as other transformers models do, outside training
    assert model(random_ids(1, 5), labels=random_ids(1, 5)).past_key_values is None


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_own_loop(model, cache):
    keys = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    rows = [random_ids(1, n, seed=n) for n in (3, 8)]
    expected = [greedy(model, row, 10) for row in rows]
    assert torch.equal(model.generate(rows[1], **keys), expected[1])
    ids = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), rows[0]), 1), rows[1]))
    mask = torch.tensor([[0] * 5 + [1] * 3, [1] * 8])
    out = model.generate(ids, attention_mask=mask, **keys)
    assert torch.equal(out[:1, 5:], expected[0]) and torch.equal(out[1:], expected[1])


def test_beam_search_and_several_samples_equal_llama(model, llama):
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for keys in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
    ):
        outs = []
        for each in (model, llama):
            torch.manual_seed(1)
            outs.append(
                each.generate(ids, attention_mask=mask, max_new_tokens=7, pad_token_id=0, eos_token_id=2, **keys)
            )
        assert torch.equal(*outs)


def test_generate_takes_stop_strings_and_all_that_llama_takes(model, llama, tokenizer):
    """generate() hands the tokenizer on to forward. A text that the likeliest words hold ends them early."""
    own = make_model(vocab_size=6400)
    ids = random_ids(1, 6)
    keys = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    whole = own.generate(ids, **keys)[0, 6:]
    text = tokenizer.decode(whole[:4])
    stop = tokenizer.decode(whole[3:4])
    short = own.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **keys)[0, 6:]
    assert torch.equal(short, whole[: len(short)]) and len(short) <= 4 and stop in text
    for more in ({"output_hidden_states": True}, {"output_scores": True, "output_logits": True}):
        theirs, ours = (each.generate(ids, return_dict_in_generate=True, **keys, **more) for each in (llama, model))
        assert torch.equal(ours.sequences, theirs.sequences) and ours.keys() == theirs.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states_equal_llama(by_config, llama):
    """What each layer was given, and the normed end."""
    model, ids = make_model(), random_ids(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    model.config.output_hidden_states = by_config
    out = model(ids, attention_mask=mask, **({} if by_config else {"output_hidden_states": True}))
    wanted = llama(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and model(ids, output_hidden_states=False).hidden_states is None
    for ours, theirs in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], **CLOSE)


def test_logits_to_keep(model):
    ids = random_ids(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    marked = torch.rand(2, 9) < 0.4
    torch.testing.assert_close(model(ids, logits_to_keep=marked.nonzero(as_tuple=True)).logits, full[marked])


def test_unknown_arguments_are_refused(model):
    """Mistake 9: arguments that change the result swallowed by **kwargs."""
    ids = random_ids(1, 4)
    for keys in ({"lables": ids}, {"output_attentions": True}, {"token_type_ids": ids}):
        with pytest.raises(TypeError, match=next(iter(keys))):
            model(ids, **keys)
    with pytest.raises(ValueError, match="either"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    model(ids, cache_position=torch.arange(4), output_attentions=False, output_hidden_states=None)
    assert isinstance(model(ids, return_dict=True), MiniMindOutput)
    assert isinstance(model(ids, labels=ids, return_dict=False), tuple)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, model(ids).logits)


# ----------------------------------------------------------------------------------------------------------------------
# Life inside transformers and torch


@pytest.mark.parametrize("use_moe", [False, True])
def test_save_and_load_pretrained(tmp_path, use_moe):
    """Mistake 10: tied weights that nobody declared; also tables that are garbage after meta initialisation."""
    model = make_model(use_moe=use_moe)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again, report = MiniMindForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    ids = random_ids(2, 10)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_untied_weights_stay_untied(tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)


def test_remote_code_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MiniMindConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(MiniMindForCausalLM, "_auto_class", "AutoModelForCausalLM")
    model = make_model()
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    parts = {"LMConfig.py", "model_minimind.py", "attention.py", "functional.py", "loss.py", "outputs.py", "errors.py"}
    assert parts <= {path.name for path in folder.iterdir()}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(config) is not MiniMindConfig and type(again) is not MiniMindForCausalLM
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = random_ids(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        again.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_embeddings_resize_deepcopy_and_pickle():
    model = make_model()
    ids = random_ids(1, 6)
    logits = model(ids).logits
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert torch.equal(twin(ids).logits, logits)
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model.config.vocab_size == 101 and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits[..., :97], logits)


@pytest.mark.parametrize("use_moe", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_moe):
    model = make_model(use_moe=use_moe).train()
    ids = random_ids(2, 10)
    gradients = []
    for enable in (False, True):
        if enable:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(ids, labels=ids)
        total = out.loss + (out.aux_loss or 0)
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    model = make_model().train()
    ids = random_ids(2, 24)
    mask = torch.tensor([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step(run):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(ids, attention_mask=mask, labels=ids, return_logits=False)
        return out.loss, torch.autograd.grad(out.loss, list(model.parameters()))

    (loss, gradients), (expected, wanted) = step(compiled), step(model)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_training_step_lowers_the_loss():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = random_ids(2, 32)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_peft_lora():
    peft = pytest.importorskip("peft")
    model = make_model()
    ids = random_ids(1, 6)
    logits = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(wrapped(ids).logits, logits)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in wrapped.named_parameters())
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, **CLOSE)


def test_trl_sft(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = make_model(vocab_size=max(6400, len(tokenizer)))
    rows = datasets.Dataset.from_list([{"text": "one two three four"}] * 8)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        max_length=32,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    before = model.model.norm.weight.clone()
    result = trainer.train()
    assert math.isfinite(result.training_loss) and not torch.equal(before, model.model.norm.weight)

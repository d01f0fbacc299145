"""The benchmark: what it counts, that its plain loop learns the same, and that memory does not grow with V times N."""

import json

import pytest
import torch
from commands import write_rows

from model.errors import InputError, UsageError
from model.errors import run_script as run_script_here
from model.generation import Engine
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import benchmark, benchmark_generate, benchmark_rl, benchmark_train
from scripts.benchmark import parse_args
from scripts.benchmark_train import Product, Step, Trainer, model_products

TINY = ["--hidden_size", "32", "--num_hidden_layers", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data file of each stage and a cache folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    texts = [{"text": f"the number {n} follows the number {n - 1}. " * (1 + n % 4)} for n in range(1, 200)]
    chats = [
        {"conversations": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}, " * 9}]}
        for n in range(200)
    ]
    for stage, rows in (("pretrain", texts), ("sft", chats)):
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_args(folder, *flags, stage="pretrain"):
    base = ["train", *TINY, "--stage", stage, "--data_path", str(folder / f"{stage}.jsonl"), "--out_dir", str(folder)]
    return parse_args([*base, *flags])


@pytest.mark.parametrize("use_moe", [False, True])
def test_products_are_those_of_the_model(use_moe):
    """Dense: 6 flops a weight and token. Attention: six products of T x T. Counted independently of the benchmark."""
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=200, use_moe=use_moe)
    rows, length, targets = 2, 40, 70
    flops = sum(p.flops * times for p, times in model_products(config, rows, length, targets).items())
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    layers = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    if use_moe:  # two of four routed experts
        layers -= sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) // 2
    linear = 6 * (layers * rows * length + config.vocab_size * config.hidden_size * targets)
    attention = 6 * 2 * rows * length * length * config.hidden_size * config.num_hidden_layers
    assert flops == linear + attention


def test_products_equal_the_matrix_products_that_run():
    """The count against what a real forward and backward pass multiplies, attention written out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, flash_attn=False)
    model = MiniMindForCausalLM(config).train()
    ids = torch.randint(64, (2, 24))
    # In bfloat16, because the counter passes over addmm_, which sums up the head's gradient in float32.
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, return_logits=False).loss.backward()
    expected = sum(p.flops * times for p, times in model_products(config, 2, 24, 2 * 23).items())
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_product_can_be_timed(layout, batch):
    product = Product(batch, 8, 16, 24, layout)
    assert product.flops == 2 * batch * 8 * 16 * 24
    assert benchmark_train.time_product(product, torch.float32, torch.device("cpu")) > 0


def test_padding_is_never_counted(folder):
    for flags in ([], ["--packing", "0"], ["--plain"]):
        trainer = Trainer(make_args(folder, "--max_seq_len", "96", "--accumulation_steps", "3", *flags))
        step, fresh = trainer.step(), Trainer(make_args(folder, "--max_seq_len", "96", *flags)).batches
        batches = [next(fresh) for _ in range(3)]
        assert step.tokens == sum(int((batch["attention_mask"] > 0).sum()) for batch in batches)
        assert step.targets == sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert step.places == 3 * 4 * 96
        assert (step.tokens > 0.9 * step.places) == (not flags)
    assert Step(2.0, 100, 400, 90).rate == 50


def test_plain_loop_is_plain_and_has_the_same_loss(folder):
    args = make_args(folder, "--optimizer", "muon", "--use_compile", "--plain", stage="sft")
    plain = Trainer(args)
    assert plain.dtype == torch.float32 and plain.net is plain.model and not args.packing
    assert type(plain.optimizer) is torch.optim.AdamW
    fast = Trainer(make_args(folder, "--packing", "0", stage="sft"))
    fast.model.load_state_dict(plain.model.state_dict())
    batch = next(plain.batches)
    torch.testing.assert_close(plain.loss_sum(batch, 0.0), fast.loss_sum(batch, 0.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("preset", ["minimind2-moe", "minimind-v1-moe"])
def test_active_dense_has_the_active_parameters_of_the_mixture(preset):
    sizes = []
    for flags in ([], ["--active_dense"]):
        with torch.device("meta"):
            model = MiniMindForCausalLM(benchmark_train.make_config(parse_args(["train", "--preset", preset, *flags])))
        sizes.append(benchmark_train.active_parameters(model))
    assert sizes[1] == sum(p.numel() for p in model.parameters())
    assert abs(sizes[0] / sizes[1] - 1) < 0.01
    with pytest.raises(UsageError, match="--active_dense"):
        benchmark_train.make_config(parse_args(["train", "--active_dense"]))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_memory_does_not_grow_with_vocabulary_times_tokens(folder, monkeypatch, optimizer):
    """What a larger vocabulary adds to the peak of a step must not depend on how many tokens the step has."""
    monkeypatch.setattr("model.loss.LOSS_CHUNK", 64)
    small, large = 6400, 25600

    def peak(vocabulary: int, rows: int, *flags: str) -> int:
        sizes = ["--vocab_size", vocabulary, "--batch_size", rows, "--accumulation_steps", 1, "--max_seq_len", 128]
        trainer = Trainer(make_args(folder, *map(str, sizes), "--optimizer", optimizer, *flags))
        trainer.step()
        return trainer.peak_memory()

    few, many = (peak(large, rows) - peak(small, rows) for rows in (2, 8))
    logits = (large - small) * 6 * 128 * 4  # what float32 logits of the further rows would add
    assert many - few < 0.1 * logits
    few, many = (peak(large, rows, "--plain") - peak(small, rows, "--plain") for rows in (2, 8))
    assert many - few > logits  # the measurement sees it where it is


def test_against_takes_the_same_flags_and_more_on_top():
    args = parse_args(["train", "--batch_size", "2", "--against", "--plain"])
    assert (args.plain, args.other.plain, args.other.batch_size) == (False, True, 2)
    args = parse_args(["train", "--batch_size", "2", "--against", "--batch_size 3 --optimizer adamw"])
    assert (args.batch_size, args.other.batch_size, args.other.optimizer) == (2, 3, "adamw")
    assert parse_args(["train"]).other is None


def test_ratio_is_taken_round_by_round():
    first = [Step(1.0, 100, 0, 0), Step(1.0, 300, 0, 0), Step(2.0, 400, 0, 0)]
    second = [Step(1.0, 100, 0, 0), Step(1.0, 100, 0, 0), Step(1.0, 50, 0, 0)]
    assert benchmark_train.compare(first, second) == {"ratio": 3.0, "ratio_min": 1.0, "ratio_max": 4.0}


def test_script_prints_a_table_and_writes_json(run_script, folder, tmp_path):
    path = tmp_path / "new" / "figures.json"
    flags = ["train", *TINY, "--data_path", folder / "pretrain.jsonl", "--out_dir", folder, "--max_seq_len", "64"]
    done = run_script(
        "scripts/benchmark.py",
        [*flags, "--steps", "2", "--warmup", "1", "--against", "--plain", "--json", path, "--profile"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens_per_s" in done.stdout and "tokens/s over those with" in done.stdout and "aten::mm" in done.stdout
    report = json.loads(path.read_text())
    assert [each["plain"] for each in report["settings"]] == [False, True]
    for figures in report["figures"]:
        assert figures["tokens_per_s"] > 0 and 0 < figures["matmul_share"] < 1 and 0 < figures["mfu"] < 1
        assert figures["peak_memory_mb"] > 0 and 0 <= figures["padding_share"] < 1


@pytest.mark.parametrize(
    "flags, code, named",
    [
        (["train", "--data_path", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["train", "--batch_size", "5000", *TINY], 2, "--batch_size"),
        (["train", "--vocab_size", "100", *TINY], 2, "--vocab_size 100 is too small: the tokenizer has 6400"),
        (["train", "--steps", "0"], 2, "--steps"),
        (["train", "--against", "--nonsense 1"], 2, "--nonsense"),
        ([], 2, "COMMAND"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, folder, flags, code, named):
    if "--data_path" not in flags and "--batch_size" in flags:
        flags = [*flags, "--data_path", str(folder / "pretrain.jsonl")]
    with pytest.raises(SystemExit) as end:
        run_script_here(lambda: parse_args([*flags, *(["--out_dir", str(folder)] if flags else [])]), benchmark.main)
    assert end.value.code == code and named in capsys.readouterr().err


def test_every_flag_is_explained():
    parser = benchmark.build_parser()._subparsers._group_actions[0].choices["train"]
    assert all(action.help for action in parser._actions)


# ------------------------------------------------------------------------------------------------------------ generate


TINY_WORK = ["--device=cpu", "--rounds=2", "--new_tokens=6", "--prompt_tokens=9"]


@pytest.fixture
def tiny_weights(tmp_path):
    torch.manual_seed(3)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    keys = {"stage": "full_sft", "tokens_seen": 1, "data_path": "x", "data_hash": "x", "trained_length": 64}
    save_weights(model, tmp_path / "full_sft_64.pth", **keys)
    return tmp_path / "full_sft_64.pth"


@pytest.mark.parametrize("natural", [False, True])
def test_generate_tells_speed_share_and_equality_of_each(natural, tiny_weights, tmp_path, capsys):
    flags = ["--weight", str(tiny_weights), "--batch", "1", "3", *TINY_WORK, *["--natural"] * natural]
    benchmark.main(parse_args(["generate", *flags, "--json", str(tmp_path / "g.json")]))
    report = json.loads((tmp_path / "g.json").read_text())
    for batch in ("1", "3"):
        figures = report["figures"][batch]
        assert figures["engine"]["same_tokens"] == figures["generate float32"]["same_tokens"] == 1
        for each in figures.values():
            assert each["prefill_tokens_per_s"] > 0 and each["decode_tokens_per_s"] > 0
        best = max(each["over_generate"][0] for name, each in figures.items() if "generate" in name)
        assert 0.5 < best <= 1
    assert "batch 3" in capsys.readouterr().out


def test_contenders_do_the_same_work():
    """Prompts of unequal length: the replies are generate's, and only tokens behind the first of each are counted."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    prompts = [[5, 9, 11], [7, 8, 30, 60, 4, 17, 23]]
    ours = benchmark_generate.run_engine(Engine(model), prompts, 5, natural=False)
    theirs = benchmark_generate.run_generate(model, prompts, 5, natural=False)
    assert ours.replies == theirs.replies and [len(reply) for reply in ours.replies] == [5, 5]
    assert ours.decoded == theirs.decoded == 8


def test_natural_replies_end_at_the_end_token():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    prompts = [[5, 9, 11], [7, 8, 30, 60, 4, 17, 23]]
    free = benchmark_generate.run_generate(model, prompts, 8, natural=False).replies
    model.config.eos_token_id = model.generation_config.eos_token_id = free[0][2]  # as if this token ended replies
    assert benchmark_generate.run_generate(model, prompts, 8, natural=False).replies == free
    model.generation_config.eos_token_id = free[0][2]
    place = free[0].index(model.config.eos_token_id)
    runs = [benchmark_generate.run_generate(model, prompts, 8, natural=True)]
    runs.append(benchmark_generate.run_engine(Engine(model), prompts, 8, natural=True))
    for run in runs:
        assert run.replies[0] == free[0][: place + 1]
        assert run.decoded == sum(map(len, run.replies)) - 2


def test_limits_count_what_a_step_reads_and_multiplies():
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100))
    parameters = sum(p.numel() for p in model.parameters())  # the embedding is the head too: read once
    cached = 10 * 2 * 2 * 16 * 7  # sequences, layers, keys and values, 2 heads of 8, tokens
    slow_memory = benchmark_generate.least_step_seconds(model, 10, 7, 2, 4, (1.0, 1e30))
    slow_products = benchmark_generate.least_step_seconds(model, 10, 7, 2, 4, (1e30, 1.0))
    assert slow_memory == 2 * parameters + 4 * cached
    assert slow_products == 10 * 2 * (parameters + 2 * 2 * 64 * 7)


@pytest.fixture
def rl_flags(tmp_path):
    rows = [
        {"conversations": [{"role": "user", "content": "Add. " * (1 + i % 3) + str(i)}], "answer": str(i)}
        for i in range(9)
    ]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    few = "--batch_size 2 --accumulation_steps 1 --num_generations 2"
    flags = [f"--data_path={data}", "--prompts=5", "--max_new_tokens=6", "--steps=3", "--rounds=2", "--device=cpu"]
    return ["rl", *flags, "--flags", few, "--json", str(tmp_path / "rl.json"), "--out_dir", str(tmp_path)]


def test_rl_tells_the_parts_of_a_step_and_the_rollouts(rl_flags, tiny_weights, tmp_path, capsys):
    benchmark.main(parse_args(rl_flags))
    report, out = json.loads((tmp_path / "rl.json").read_text()), capsys.readouterr().out
    assert report["weight"] == str(tiny_weights) and f"threads: {tiny_weights}" in out  # found in --out_dir
    steps = report["steps"]
    assert list(steps) == ["sampling", "reward", "scoring", "updates", "whole"]
    parts = [steps[part]["share"] for part in ("sampling", "reward", "scoring", "updates")]
    assert sum(parts) == pytest.approx(1) and steps["whole"]["share"] == 1 and steps["sampling"]["seconds"] > 0
    whole = steps["whole"]["seconds"] * steps["whole"]["tokens_per_s"]
    assert 4 <= round(whole) <= 24  # tokens of four replies
    assert {"engine", "generate float32"} <= set(report["rollouts"])
    assert max(each["over_generate"][0] for name, each in report["rollouts"].items() if "generate" in name) > 0.5
    for each in report["rollouts"].values():
        for middle, low, high in each["over_generate"], each["reply_tokens"]:
            assert 0 < low <= middle <= high
    assert len(report["prompt_tokens"]) == 5 and len(set(report["prompt_tokens"])) > 1
    assert f"rollouts of 5 prompts of {report['prompt_tokens'][0]} to" in out and "over the fastest generate" in out
    assert list(tmp_path.glob("grpo*")) == [] == list(tmp_path.glob("logs"))  # what the steps learned is thrown away


def test_rl_measures_new_weights_where_there_are_none(rl_flags, tmp_path, capsys, monkeypatch):
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(MiniMindConfig, "from_preset", lambda preset, **sizes: MiniMindConfig(**tiny))
    benchmark.main(parse_args(rl_flags))
    assert json.loads((tmp_path / "rl.json").read_text())["weight"] is None
    assert f"new weights of minimind2-small (no trained ones in {tmp_path})" in capsys.readouterr().out


def test_rl_takes_the_weights_that_are_named(tiny_weights, tmp_path):
    reason = tmp_path / "reason_64.pth"
    reason.write_bytes(b"")
    for flags, found in (
        ([], reason), ([f"--weight={tiny_weights}"], tiny_weights), (["--preset=minimind2"], None),
    ):  # fmt: skip
        assert benchmark_rl.find_start(parse_args(["rl", f"--out_dir={tmp_path}", *flags])) == found


def test_both_sample_the_same_prompts_to_their_ends():
    """A model that is sure of every token: what it samples is known, so both have to say the same."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    torch.nn.init.constant_(model.model.norm.weight, 300.0)  # logits far apart
    prompts = [[5, 9, 11], [7, 8, 30, 60, 4, 17, 23], [100]]
    ours = benchmark_rl.sample_by_engine(Engine(model), prompts, [], 8, 0)
    assert [len(reply) for reply in ours] == [8, 8, 8]
    ends = [ours[0][2], ours[1][5]]  # as if these ended replies
    wanted = [reply[: min(reply.index(end) + 1 if end in reply else 8 for end in ends)] for reply in ours]
    assert len({len(reply) for reply in wanted}) > 1
    for sample, sampler in (benchmark_rl.sample_by_engine, Engine(model)), (benchmark_rl.sample_by_generate, model):
        assert sample(sampler, prompts, ends, 8, 1) == wanted


def test_generate_refuses_what_it_cannot_measure(tmp_path):
    with pytest.raises(UsageError, match="--weight"):
        benchmark.main(parse_args(["generate", "--natural"]))
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=32))
    model.save_pretrained(tmp_path / "short")
    short = ["generate", f"--weight={tmp_path / 'short'}", "--batch=1", "--device=cpu", "--prompt_tokens=27"]
    with pytest.raises(UsageError, match="27 tokens with --new_tokens 6 pass the context of 32: lower --new_tokens or"):
        benchmark.main(parse_args([*short, "--new_tokens=6"]))
    benchmark.main(parse_args([*short, "--new_tokens=5", "--rounds=1"]))
    gguf = ["--batch=1", "--preset=minimind2-small", f"--gguf={tmp_path / 'none.gguf'}"]
    with pytest.raises(InputError, match=r"llama-cpp-python|none\.gguf does not exist"):
        benchmark.main(parse_args(["generate", *gguf]))

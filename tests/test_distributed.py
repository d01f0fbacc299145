"""Several processes: equal weights however a step is split, one voice, no hang when a process dies, elastic resume."""

import json
import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, SERVER, Torchrun, Training, count_buckets, exchange_gradients, free_port, slow_steps

TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--log_interval=1"]
TINY += ["--max_seq_len=64", "--packing=0", "--from_weight=none", "--eval_interval=5", "--save_interval=100"]
STEPS = 10  # of 8 rows; an epoch of 25 rows has 8 8 8 1: its last step leaves a second rank without a row


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": f"第{i}句话：" + "the quick brown fox jumps. " * (1 + i % 4)} for i in range(25)]
    chats = [chat(f"Question {i}?", "Answer, " * (1 + i % 5) + f"{i}.") for i in range(25)]
    for name, rows in ("pretrain", texts), ("full_sft", chats):
        write_rows(folder / f"{name}.jsonl", rows)
        write_rows(folder / f"{name}_val.jsonl", rows[:7])
    return folder


def flags_of(data, stage, out_dir, *flags):
    return [*TINY, f"--data_path={data / stage}.jsonl", f"--out_dir={out_dir}", f"--max_steps={STEPS}", *flags]


def log_of(out_dir, name="pretrain_64"):
    return [json.loads(line) for line in (out_dir / "logs" / f"{name}.jsonl").read_text().splitlines()]


def log_name(case):
    return f"{CASES[case][0]}_64" + "_moe" * (case == "mixture")


# ------------------------------------------------------------------------------------------------------ equal weights

CASES = {
    "pretrain muon": ("pretrain", ["--optimizer=muon"]),
    "pretrain adamw": ("pretrain", ["--optimizer=adamw"]),
    "sft muon": ("full_sft", ["--optimizer=muon"]),
    "sft adamw": ("full_sft", ["--optimizer=adamw"]),
    "mixture": ("pretrain", ["--optimizer=muon", "--use_moe"]),
}
LOSSES = {  # of steps 1, 4, 7, 10: what these runs were before the loop was shared
    "pretrain muon": [8.819031, 7.840414, 6.880593, 6.152702],
    "pretrain adamw": [8.819031, 8.202056, 7.748288, 7.443571],
    "sft muon": [8.817713, 8.496423, 8.125099, 7.889226],
    "sft adamw": [8.817713, 8.639524, 8.447205, 8.360010],
    "mixture": [8.771598, 7.832412, 6.908177, 6.205764],
}
SPLITS = {"1 x 8": (1, 8, 1), "1 x 4 x 2": (1, 4, 2), "2 x 4": (2, 4, 1), "2 x 2 x 2": (2, 2, 2)}


@pytest.fixture(scope="module")
def splits(data, tmp_path_factory):
    """The same steps split four ways over ranks and micro-batches: {case: {split: (run, folder)}}."""
    home, runs = tmp_path_factory.mktemp("splits"), {}
    for case, (stage, more) in CASES.items():
        runs[case] = {}
        for split, (ranks, batch, accumulation) in SPLITS.items():
            folder = home / f"{case} {split}"
            flags = flags_of(
                data, stage, folder, *more, f"--batch_size={batch}", f"--accumulation_steps={accumulation}"
            )
            runs[case][split] = Training(stage, [*flags, "--trace_samples"], folder / "rank", ranks), folder
        for run, _ in runs[case].values():  # all at once
            assert set(run.wait()) == {0}, run.err()
    return runs


@pytest.mark.parametrize("case", CASES)
def test_weights_do_not_depend_on_how_a_step_is_split(case, splits):
    one, _ = splits[case]["1 x 8"]
    for split in list(SPLITS)[1:]:
        other, _ = splits[case][split]
        apart = (one.weights() - other.weights()).norm() / one.weights().norm()
        assert apart < 1e-5, split


@pytest.mark.parametrize("case", CASES)
def test_meters_do_not_depend_on_how_a_step_is_split(case, splits):
    """Loss, gradient norm, expert load of the whole step, tokens of all ranks; held-out numbers shared among them."""
    name = log_name(case)
    one = log_of(splits[case]["1 x 8"][1], name)
    assert [record["step"] for record in one] == list(range(1, STEPS + 1))
    assert [record["step"] for record in one if "val_loss" in record] == [5, 10]
    for split in list(SPLITS)[1:]:
        for a, b in zip(one, log_of(splits[case][split][1], name), strict=True):
            assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
            for key in {"loss", "grad_norm", "val_loss", "val_bpb"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=2e-5), (split, key)
            assert a.get("peak_expert_load") == b.get("peak_expert_load"), split  # a count of tokens


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_recorded(case, splits):
    losses = [line["loss"] for line in log_of(splits[case]["1 x 8"][1], log_name(case))]
    assert losses[::3] == pytest.approx(LOSSES[case], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_replicas_stay_equal_to_the_bit(case, splits):
    run, _ = splits[case]["2 x 4"]
    assert torch.equal(run.weights(0), run.weights(1))


def test_only_rank_0_prints_and_writes(splits):
    for split in "2 x 4", "2 x 2 x 2":
        run, folder = splits["pretrain muon"][split]
        assert run.out(1) == run.err(0) == run.err(1) == ""
        assert re.findall(r"^pretrain (\d+)/10 ", run.out(), re.MULTILINE) == [str(i) for i in range(1, STEPS + 1)]
        assert "2 processes x " in run.out() and run.out().count("wrote ") == 1
        written = sorted(path.name for path in folder.rglob("pretrain_64*"))
        assert written == sorted([
            "pretrain_64.json", "pretrain_64.pth", "pretrain_64.jsonl", "pretrain_64.png", "pretrain_64_resume.pth",
            "pretrain_64_samples.0.jsonl", "pretrain_64_samples.1.jsonl",
        ])  # fmt: skip


def test_ranks_share_the_rows_of_a_step(splits):
    """Each of the 25 rows once an epoch, and the same rows in a step however it is split."""
    steps = {}
    for split in SPLITS:
        _, folder = splits["pretrain muon"][split]
        for path in folder.glob("logs/*_samples.*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(split, {}).setdefault(line["step"], []).extend(line["rows"])
        assert sorted(row for step in (1, 2, 3, 4) for row in steps[split][step]) == list(range(25))
        assert [len(steps[split][step]) for step in range(1, STEPS + 1)] == [8, 8, 8, 1, 8, 8, 8, 1, 8, 8]
        for step, rows in steps["1 x 8"].items():
            assert sorted(rows) == sorted(steps[split][step])


def test_gradients_cross_the_ranks_once_a_step(data, tmp_path):
    counts = []
    for batch, accumulation in (4, 1), (1, 4):
        out, path = tmp_path / str(batch), tmp_path / f"{batch}.count"
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", "--max_steps=3"]
        run = Training("pretrain", flags_of(data, "pretrain", out, *flags), out / "rank", 2, (count_buckets, path))
        assert run.wait() == [0, 0], run.err()
        counts.append(json.loads(path.read_text()))
    assert counts[0] == counts[1] > 0 and counts[0] % 3 == 0


def test_three_ranks_add_in_the_same_order_at_every_step(tmp_path):
    """Else a resumed run, whose first step is another's seventh, would differ in the last bit."""
    port, output = free_port(), tmp_path / "gradients"
    ranks = [SERVER.Process(target=exchange_gradients, args=(output, rank, 3, port)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    first, *later = torch.load(f"{output}.0", weights_only=True)
    assert first.any() and all(torch.equal(first, other) for other in later)
    assert torch.equal(first, torch.load(f"{output}.2", weights_only=True)[0])


# --------------------------------------------------------------------------------------------------- the real launcher


def test_two_nodes_over_loopback(data, tmp_path, splits):
    """Two launchers that meet at a port, one process each, each with a folder of its own."""
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    rendezvous += ["--rdzv_id=test", "--local_addr=127.0.0.1"]
    flags = ["--optimizer=muon", "--batch_size=4", "--accumulation_steps=1"]
    nodes = [
        Torchrun(
            [*rendezvous, f"--node_rank={node}"], "pretrain",
            flags_of(data, "pretrain", tmp_path / str(node), *flags), tmp_path / f"node{node}",
        )
        for node in range(2)
    ]  # fmt: skip
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].err()
    by_output = sorted(nodes, key=lambda node: "pretrain 10/10" in node.out())
    assert by_output[0].out() == "" and by_output[1].out().count("pretrain 10/10") == 1
    (weights,) = tmp_path.rglob("pretrain_64.pth")
    reference = splits["pretrain muon"]["2 x 4"][1] / "pretrain_64.pth"
    expected, found = (torch.load(path, weights_only=True) for path in (reference, weights))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_killed_rank_ends_the_job_and_it_can_be_resumed(data, tmp_path, splits):
    """SIGKILL of one rank: no hang, an exit code, whole files; the same launch again ends with the same bits."""
    launcher = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    slow = write_rows(tmp_path / "slow.jsonl", [{"text": "the quick brown fox jumps. " * 4}] * 150)
    more = ["--optimizer=muon", "--batch_size=4", "--accumulation_steps=1", "--save_interval=2"]
    more += [f"--val_path={slow}", "--eval_interval=1", "--eval_rows=150"]  # so that it is not over before it is killed
    flags = flags_of(data, "pretrain", tmp_path, *more)
    job = Torchrun(launcher, "pretrain", flags, tmp_path / "first")
    job.wait_for("pretrain 5/10")
    began = time.monotonic()
    os.kill(job.children()[1], signal.SIGKILL)
    assert job.wait() != 0 and time.monotonic() - began < 60
    assert "pretrain 10/10" not in job.out()
    again = Torchrun(launcher, "pretrain", [*flags, "--from_resume", "1"], tmp_path / "again")
    assert again.wait() == 0, again.err()
    assert again.err() == ""  # torch warns of nothing either
    assert "resumed after step" in again.out()
    checkpoints = [
        torch.load(folder / "checkpoints" / "pretrain_64_resume.pth", weights_only=True)["engines"]["model"]
        for folder in (splits["pretrain muon"]["2 x 4"][1], tmp_path)
    ]
    for key in "weights", "optimizer":
        for name, value in checkpoints[0][key].items():
            torch.testing.assert_close(checkpoints[1][key][name], value, rtol=0, atol=0)
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, STEPS + 1))


def test_torchrun_restarts_a_killed_rank_from_its_checkpoint(data, tmp_path, splits):
    launcher = ["--nproc_per_node=2", f"--master_port={free_port()}", "--max_restarts=1"]
    slow = write_rows(tmp_path / "slow.jsonl", [{"text": "the quick brown fox jumps. " * 4}] * 150)
    more = ["--optimizer=muon", "--batch_size=4", "--accumulation_steps=1", "--save_interval=2"]
    more += [f"--val_path={slow}", "--eval_interval=1", "--eval_rows=150"]  # so that it is not over before it is killed
    job = Torchrun(launcher, "pretrain", flags_of(data, "pretrain", tmp_path, *more), tmp_path / "job")
    job.wait_for("pretrain 5/10")
    os.kill(job.children()[1], signal.SIGKILL)
    assert job.wait() == 0, job.err()
    assert int(re.search(r"resumed after step (\d+)", job.out())[1]) >= 4
    reference = splits["pretrain muon"]["2 x 4"][1] / "pretrain_64.pth"
    expected, found = (torch.load(path, weights_only=True) for path in (reference, tmp_path / "pretrain_64.pth"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, STEPS + 1))


def test_a_machine_that_joins_an_elastic_launch_loses_nothing(data, tmp_path, monkeypatch):
    """torchrun ends the processes and starts them for two machines, its count of restarts still 0."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # torch 2.13 waits for ever for what nobody sets
    launcher = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    launcher += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_conf=last_call_timeout=1"]
    flags = flags_of(data, "pretrain", tmp_path, "--batch_size=4", "--max_steps=100000")
    first = Torchrun(launcher, "pretrain", flags, tmp_path / "first")
    first.wait_for("pretrain 2/")
    second = Torchrun(launcher, "pretrain", flags, tmp_path / "second")
    first.wait_for("resumed after step")
    for job in first, second:
        job.process.send_signal(signal.SIGTERM)
    assert first.wait() != 0 != second.wait()
    saved = int(re.search(r"stopped and saved after step (\d+)", first.err())[1])
    assert f"resumed after step {saved}:" in first.out() + second.out()
    assert "2 processes x " in first.out() + second.out()


def test_bad_input_ends_a_job_with_one_sentence(data, tmp_path):
    launcher = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    job = Torchrun(launcher, "pretrain", [*TINY, "--data_path=no.jsonl", f"--out_dir={tmp_path}"], tmp_path / "job")
    assert job.wait() != 0
    assert job.err().count("error: no.jsonl does not exist; give a JSON lines file with --data_path") == 1
    assert "another process of this run ended" not in job.err()


def test_bad_input_on_one_rank_alone_ends_all(data, tmp_path):
    """The rank whose machine has another data file says so; nobody waits for ever."""
    run = Training("pretrain", flags_of(data, "pretrain", tmp_path), tmp_path / "rank", 2, (take_other_data, str(data)))
    codes = run.wait()
    assert codes == [1, 1] and "differ in their data file, tokenizer or checkpoint" in run.err()
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.jsonl"))


def take_other_data(folder):
    from trainer.runtime import start

    start.resolve_data = lambda *_: (Path(folder) / "pretrain_val.jsonl", None)


def test_sigterm_to_a_launcher_saves_though_its_signal_reaches_loaders_too(data, tmp_path):
    """torchrun signals whole process groups, and again when it loses patience with them."""
    launcher = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    flags = flags_of(data, "pretrain", tmp_path, "--batch_size=4", "--max_steps=3000", "--num_workers=1")
    job = Torchrun(launcher, "pretrain", flags, tmp_path / "job")
    job.wait_for("pretrain 6/3000")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() != 0
    saved = torch.load(tmp_path / "checkpoints" / "pretrain_64_resume.pth", weights_only=True)["place"]["step"]
    assert saved == log_of(tmp_path)[-1]["step"] >= 6
    said = re.findall(r"^stopped and saved after step (\d+); to go on: torchrun --nproc_per_node 2 .* --from_resume 1$",
                      job.err(), re.MULTILINE)  # fmt: skip
    assert said == [str(saved)] and job.err().count("stopping after this step") == 1


# ------------------------------------------------------------------------------------------------------------- elastic


def test_other_ranks_and_batches_see_the_same_remaining_rows(data, tmp_path):
    """2 ranks x 4 -> 1 rank x 4 -> 2 ranks x 8, killed or stopped in between: every row of each epoch exactly once."""
    common = [*TINY, f"--data_path={data / 'pretrain.jsonl'}", f"--out_dir={tmp_path}", "--epochs=3", "--trace_samples"]
    common += ["--accumulation_steps=1", "--warmup_ratio=0", "--eval_interval=1000"]
    first = Training("pretrain", [*common, "--batch_size=4", "--save_interval=2"], tmp_path / "first", 2, (slow_steps,))
    first.signal_at("pretrain 3/12", signal.SIGKILL, rank=1)
    assert first.wait()[1] == -signal.SIGKILL
    saved = torch.load(tmp_path / "checkpoints" / "pretrain_64_resume.pth", weights_only=True)["place"]["step"]
    assert saved in (2, 4)
    second = Training("pretrain", [*common, "--batch_size=4", "--from_resume=1"], tmp_path / "second", 1, (slow_steps,))
    second.signal_at(f"pretrain {saved + 5}/", signal.SIGTERM)
    assert second.wait() == [143], second.err()
    third = Training("pretrain", [*common, "--batch_size=8", "--from_resume=1"], tmp_path / "third", 2)
    assert third.wait() == [0, 0], third.err()
    seen = {}
    for path in (tmp_path / "logs").glob("*_samples.*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(line["epoch"], []).extend(line["rows"])
    assert {epoch: sorted(rows) for epoch, rows in seen.items()} == {epoch: list(range(25)) for epoch in range(3)}
    log = log_of(tmp_path)
    assert [record["step"] for record in log] == list(range(1, len(log) + 1))
    drops = [earlier["lr"] - later["lr"] for earlier, later in pairwise(log)]
    assert min(drops) >= 0 and max(drops) < 0.45 * log[0]["lr"]  # a step of 16 rows is two of the plan's 12
    assert log[-1]["lr"] == pytest.approx(log[0]["lr"] / 5)  # where the plan ends

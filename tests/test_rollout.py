"""Prompts, sampled replies and their log-probabilities: what is scored is what was sampled."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_engine import make_model as make_opinionated
from small_engine import plain_distribution

from dataset.lm_dataset import BLANK, RLAIFDataset
from model.errors import InputError
from model.generation import Engine, Request
from model.sampling import Truncation
from trainer.rewards import Reply
from trainer.rollout import as_batch, make_sampler, prompts_of, roll_out, token_logprobs
from trainer.runtime.rl import parse_rl, rl_parser
from trainer.runtime.steps import MicroBatch

HOW = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.8},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}
MODELS = {"dense": {}, "moe": {"use_moe": True}, "grouped": {"use_moe": True, "n_shared_experts": 2}}


def settings(**given):
    how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 8, "seed": 3}
    return SimpleNamespace(**(how | {"max_seq_len": 64} | given))


class Prompts:
    """What roll_out and as_batch need of a dataset, without text."""

    pad_id = 0

    def __init__(self, *lengths):
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]
        self.turns, self.answers = [[] for _ in lengths], [None] * len(lengths)


def sampled(kind="dense", group=3, lengths=(3, 9, 5), **how):
    """(model, args, replies, their batch) of a small model with opinions."""
    model, args = make_opinionated(**MODELS[kind]), settings(**how)
    prompts = Prompts(*lengths)
    asked = [(row, row) for row in range(len(lengths))] + [(BLANK, -1)]
    replies = roll_out(Engine(model, max_batch=4), asked, prompts, args, group, draw=(1, 0))
    return model, args, replies, as_batch(replies, prompts, torch.device("cpu"))


# ------------------------------------------------------------------------------------------ sampled is what is scored


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", MODELS)
def test_scored_log_probabilities_are_those_of_sampling(kind, how):
    model, args, replies, batch = sampled(kind, **HOW[how])
    new, mask, _ = token_logprobs(model, batch, args)
    assert (new - batch.extra["old"])[mask].abs().max() < 1e-4
    assert not new[~mask].any() and int(mask.sum()) == sum(len(reply.ids) for reply in replies) == batch.tokens
    assert len({tuple(reply.ids) for reply in replies[:3]}) == 3  # siblings draw apart


def test_another_temperature_would_be_seen():
    model, _, _, batch = sampled(temperature=0.7)
    new, mask, _ = token_logprobs(model, batch, settings(temperature=1.0))
    assert (new - batch.extra["old"])[mask].abs().max() > 0.1


@pytest.mark.parametrize("how", HOW)
def test_scores_and_gradients_in_words(how):
    """Against the log-softmax over whole logits, cut by another program (small_engine.py)."""
    model, args, _, batch = sampled(group=1, lengths=(4, 7), **HOW[how])
    new, mask, _ = token_logprobs(model, batch, args)
    weights = torch.randn(new.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((new * weights).sum(), list(model.parameters()))
    ids = batch.inputs["input_ids"]
    logits = model(ids, batch.inputs["attention_mask"]).logits / args.temperature
    total = torch.zeros(())
    request = Request([0], temperature=1.0, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    for row, place in mask.nonzero().tolist():
        before = logits[row, place - 1]
        kept = torch.tensor(plain_distribution(before.tolist(), request, [])) > 0
        kept[ids[row, place]] = True
        logprob = before.masked_fill(~kept, -math.inf).log_softmax(-1)[ids[row, place]]
        torch.testing.assert_close(new[row, place], logprob, atol=1e-4, rtol=1e-4)
        total = total + logprob * weights[row, place]
    for a, b in zip(got, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_token_that_the_policy_would_not_keep_any_more_stays_finite():
    model, _, _, batch = sampled()
    new, mask, _ = token_logprobs(model, batch, settings(top_k=1))  # samples that are not the likeliest
    assert torch.isfinite(new).all() and (new[mask] < -0.1).any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(new.sum(), list(model.parameters())))


def test_log_probabilities_do_not_depend_on_batch_mates():
    model, args, _, batch = sampled(group=2, lengths=(3, 30))
    together, _, _ = token_logprobs(model, batch, args)
    for i in range(4):
        alone = batch.take(torch.tensor([i]).numpy(), 1)
        assert alone.inputs["input_ids"].shape[1] == int(batch.inputs["attention_mask"][i].sum())  # no padding left
        new, _, _ = token_logprobs(model, alone, args)
        torch.testing.assert_close(new[0], together[i, : new.shape[1]], atol=1e-5, rtol=1e-5)


def test_truncation_settings_are_a_requests():
    assert [x.item() for x in Truncation().columns(7, torch.device("cpu"))] == [7, math.inf, 0]
    assert [round(x.item(), 6) for x in Truncation(9, 0.5, 0.1).columns(7, torch.device("cpu"))] == [7, 0.5, 0.1]


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("ends", [[2], [2, 50], [0]])
def test_masks_cover_the_reply_with_its_end(ends):
    """Two end tokens, and one that is the padding too; a reply that is cut has none."""
    model, args, prompts = make_opinionated(), settings(max_new_tokens=40), Prompts(3, 9, 5, 4)
    engine = Engine(model)
    engine.stop_ids = ends
    replies = roll_out(engine, [(i, i) for i in range(4)], prompts, args, 6, draw=())
    batch = as_batch(replies, prompts, torch.device("cpu"))
    _, mask, _ = token_logprobs(model, batch, args)
    assert {reply.cut for reply in replies} == {True, False}
    for reply, row, ids in zip(replies, mask, batch.inputs["input_ids"], strict=True):
        assert ids[row].tolist() == reply.ids and (reply.ids[-1] in ends) == (not reply.cut)
        assert not set(reply.ids[:-1]) & set(ends)
        places = row.nonzero()[:, 0]
        assert int(places[0]) == len(prompts.ids[reply.number]) and len(places) == int(places[-1] - places[0]) + 1


def test_blank_prompts_only_fill_up():
    model, args, replies, batch = sampled(group=2, lengths=(3,))
    assert batch.rows == [0, 0, BLANK, BLANK] and not replies[-1].ids
    assert not batch.inputs["attention_mask"][2:].any()
    blank = batch.take(torch.tensor([2, 3]).numpy(), 0)
    new, mask, _ = token_logprobs(model, blank, args)
    assert not mask.any() and not new.any()
    assert all(not g.any() for g in torch.autograd.grad(new.sum(), list(model.parameters()), materialize_grads=True))
    batches = [MicroBatch([7], {}, {"prompt": torch.tensor([3, -1])}, 0, 0)]
    assert prompts_of(batches) == [(7, 3), (BLANK, -1)]


def test_the_same_draw_is_the_same_whatever_shares_the_batch():
    model, args, prompts = make_opinionated(), settings(), Prompts(3, 9, 5)
    engine = Engine(model, max_batch=4)
    all_three = roll_out(engine, [(i, i) for i in range(3)], prompts, args, 2, draw=(5, 0))
    alone = roll_out(engine, [(1, 1)], prompts, args, 2, draw=(5, 0))
    assert [reply.ids for reply in alone] == [reply.ids for reply in all_three[2:4]]
    other = roll_out(engine, [(1, 1)], prompts, args, 2, draw=(6, 0))
    assert [reply.ids for reply in alone] != [reply.ids for reply in other]
    greedy = [roll_out(engine, [(1, 1)], prompts, settings(seed=seed), draw=None)[0].ids for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_sampling_has_no_dropout_and_so_has_scoring():
    model = make_opinionated(dropout=0.5).train()
    run = SimpleNamespace(device=torch.device("cpu"), args=settings(), dtype=torch.float32)
    prompts = Prompts(3, 9, 5)
    sampler = make_sampler(model, None, run)
    batch = as_batch(roll_out(sampler, [(0, 0), (1, 1)], prompts, run.args, 2, draw=()), prompts, run.device)
    new, mask, _ = token_logprobs(model, batch, run.args)
    assert model.training and (new - batch.extra["old"])[mask].abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------------------- prompts


def ask(question, answer=None, *more):
    turns = [{"role": "user", "content": question}, *more, {"role": "assistant", "content": "无"}]
    return {"conversations": turns} | ({} if answer is None else {"answer": answer})


@pytest.fixture
def prompts(tmp_path, tokenizer):
    from commands import write_rows

    rows = [ask("3+4=？", 7), ask("Hello?"), ask("Paris is in", "France "), ask("word " * 60, "1")]
    rows += [{"conversations": [{"role": "user", "content": "Bare?"}], "system": "You are a pirate.", "answer": ""}]
    return RLAIFDataset(write_rows(tmp_path / "rl.jsonl", rows), tokenizer, 64, reply=8, seed=1)


def test_prompts_and_answers(prompts, tokenizer, capsys):
    assert prompts.answers == ["7", None, "France", None] and prompts.lines == [1, 2, 3, 5]
    assert prompts.summary() == "4 prompts, 2 with an answer to verify"
    assert all(tokenizer.decode(ids).endswith("<|im_start|>assistant\n") for ids in prompts.ids)
    assert "无" not in tokenizer.decode(prompts.ids[0]) and "pirate" in tokenizer.decode(prompts.ids[3])
    assert prompts.longest == max(map(len, prompts.ids)) <= 56


def test_rows_are_prompts_in_the_order_of_the_epoch(prompts):
    orders = []
    for epoch in 0, 1, 2, 0:
        prompts.set_epoch(epoch)
        rows = [prompts[i] for i in range(4)]
        orders.append([int(row["prompt"]) for row in rows])
        for row, number in zip(rows, orders[-1], strict=True):
            assert row["input_ids"][row["attention_mask"] > 0].tolist() == prompts.ids[number]
            assert row["attention_mask"][-1] == 1 and len(row["input_ids"]) == prompts.longest
    assert sorted(orders[0]) == [0, 1, 2, 3] and orders[0] == orders[3] and len(set(map(tuple, orders))) > 1
    assert prompts.describe(0).endswith(f":{prompts.lines[orders[0][0]]}")
    blank = prompts[BLANK]
    assert int(blank["prompt"]) == -1 and not blank["attention_mask"].any()
    assert prompts.count_targets({"prompt": torch.tensor([0, -1, 2])}) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, 'needs "conversations"'),
        ({"conversations": [{"role": "system", "content": "x"}]}, "nothing is asked"),
        (ask("x", ["y"]), "must be a text or a number, not list"),
        (ask("x", True), "must be a text or a number, not bool"),
        (ask(""), "content is empty"),
    ],
)
def test_bad_rows_are_refused_by_line(row, words, tmp_path, tokenizer):
    from commands import write_rows

    path = write_rows(tmp_path / "rl.jsonl", [ask("fine"), row])
    with pytest.raises(InputError, match=words) as error:
        RLAIFDataset(path, tokenizer, 64)
    assert f"{path}:2" in str(error.value)


def test_prompts_without_room_are_left_out_and_told(tmp_path, tokenizer, capsys):
    from commands import write_rows

    path = write_rows(tmp_path / "rl.jsonl", [ask("short"), ask("long " * 99)])
    assert len(RLAIFDataset(path, tokenizer, 64)) == 1
    assert "left out 1 prompts of more than 64 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="every prompt is longer than 8 tokens"):
        RLAIFDataset(path, tokenizer, 64, reply=56)


def test_flags_of_sampling(capsys):
    args = parse_rl(rl_parser("doc", 4), [])
    assert args.temperature == 1 and not args.reasoning and args.num_generations == 4 and args.from_weight == "full_sft"
    assert parse_rl(rl_parser("doc", 4), ["--reasoning"]).from_weight == "reason"
    assert parse_rl(rl_parser("doc", 4), ["--reasoning", "--from_weight=rlhf"]).from_weight == "rlhf"
    for wrong in "--temperature=0", "--top_p=0", "--max_new_tokens=0", "--min_p=2", "--max_new_tokens=512":
        with pytest.raises(SystemExit) as ended:
            parse_rl(rl_parser("doc", 4), [wrong])
        assert ended.value.code == 2 and wrong.split("=")[0] in capsys.readouterr().err
    assert Reply([], "").row == BLANK

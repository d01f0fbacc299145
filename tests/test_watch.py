"""The run-time checks of reinforcement learning, each against the steps that it is there for."""

from types import SimpleNamespace

import pytest
import torch

from model.errors import InputError
from trainer.runtime.watch import CUT_STEPS, DEAD_STEPS, WINDOW, Watch


def make_watch(dtype=torch.float32, **how):
    args = SimpleNamespace(**({"top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 8} | how))
    return Watch(SimpleNamespace(args=args, device=torch.device("cpu"), dtype=dtype, step=7))


def see(watch, steps, signal=True, answers=True, **means):
    """Steps of two replies that all have these means."""
    names = {"reward": 0.5, "reply_tokens": 5.0, "cut": 0.0, "entropy": 1.0, "repetition": 0.0, "accuracy": 0.5} | means
    values = {name: torch.tensor([value, value]) for name, value in names.items()}
    if not answers:
        values["accuracy"] = torch.zeros(0)
    for _ in range(steps):
        watch.rollout(values, torch.tensor([signal, False]))


@pytest.fixture
def notes(capsys):
    return lambda: capsys.readouterr().out.splitlines()


def test_a_healthy_run_is_left_in_peace(notes):
    watch = make_watch()
    see(watch, WINDOW)
    see(watch, 3 * WINDOW, reward=0.9, accuracy=0.9, reply_tokens=12.0, entropy=0.4)
    watch.first_minibatch(torch.tensor([1e-4, -1e-4]))
    watch.first_minibatch(torch.zeros(0))
    watch.replicas(torch.nn.Linear(2, 2))
    assert notes() == []


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ({"reward": 0.0}, "all rewards were equal (0 on average): take easier prompts"),
        ({"cut": 1.0}, "every reply was cut at --max_new_tokens 8: raise it"),
    ],
)
def test_no_signal(means, words):
    watch = make_watch()
    see(watch, DEAD_STEPS - 1, signal=False, **means)
    see(watch, 1, **means)
    see(watch, DEAD_STEPS - 1, signal=False, **means)
    with pytest.raises(InputError) as error:
        see(watch, 1, signal=False, **means)
    assert words in str(error.value) and "nothing was learned in 20 steps" in str(error.value)


def test_all_replies_cut(notes):
    watch = make_watch()
    see(watch, CUT_STEPS - 1, cut=1.0)
    see(watch, 1, cut=0.9)
    see(watch, CUT_STEPS - 1, cut=1.0)
    assert notes() == []
    see(watch, 9, cut=1.0)
    (line,) = notes()
    assert line.startswith("note: step 7: every reply of 5 steps was cut at --max_new_tokens 8: raise it")


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("how", [{"reply_tokens": 9.0}, {"reply_tokens": 2.0}, {"repetition": -0.4}])
def test_reward_by_length_or_repetition_alone(how, answers, notes):
    watch = make_watch()
    see(watch, WINDOW, answers=answers)
    see(watch, 4 * WINDOW, answers=answers, reward=0.9, **how)
    (line,) = notes()
    assert "reward rose from 0.50 to 0." in line and "length or repetition alone" in line and "--rewards" in line


def test_entropy_collapse(notes):
    watch = make_watch()
    see(watch, WINDOW, entropy=0.4)
    see(watch, 6 * WINDOW, entropy=0.001)
    (line,) = notes()
    assert "entropy fell from 0.400 to 0.0" in line and "lower --learning_rate" in line


def test_a_model_sure_of_itself_from_the_start_does_not_collapse(notes):
    watch = make_watch()
    see(watch, WINDOW, entropy=0.02)
    see(watch, 6 * WINDOW, entropy=0.01)
    assert notes() == []


@pytest.mark.parametrize("log_ratio", [[0.0, 0.002], [0.0, -0.002], [float("nan"), 0.0]])
def test_ratio_at_the_first_minibatch(log_ratio):
    with pytest.raises(InputError, match="what was sampled is not what is scored: before the first update of step 7"):
        make_watch().first_minibatch(torch.tensor(log_ratio))


def test_where_tokens_are_left_out_one_at_the_edge_may_fall_on_either_side():
    make_watch(top_p=0.9).first_minibatch(torch.tensor([0.1] + 199 * [0.0]))
    with pytest.raises(InputError):
        make_watch(top_p=0.9).first_minibatch(torch.full((200,), -0.1))


def test_half_precision_is_told_once(notes):
    watch = make_watch(torch.bfloat16)
    watch.first_minibatch(torch.tensor([0.05]))
    for _ in range(2):
        watch.first_minibatch(torch.tensor([-1.5]))
    (line,) = notes()
    assert "up to 1.5 apart in torch.bfloat16: try --dtype float32" in line


def test_the_state_goes_on_where_it_was(notes):
    whole, first, second = make_watch(), make_watch(), make_watch()
    for watch in whole, first:
        see(watch, WINDOW + 3, entropy=0.4, cut=1.0)
    second.load_state_dict(first.state_dict())
    assert len(notes()) == 2
    for watch in whole, second:
        see(watch, 6 * WINDOW, entropy=0.001, cut=1.0)
    assert whole.state_dict() == second.state_dict() and len(notes()) == 2
    assert first.state_dict() != second.state_dict()

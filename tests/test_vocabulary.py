"""Weights and their tokenizer: which one is taken, what it must have, and that none is taken in silence."""

import json
import shutil

import pytest
import torch
from commands import ends
from small_runs import TINY, chat, data_of, train, write_data, write_rows
from small_tokenizer import CONTROL, NAMES, save_tokenizer
from tokenizers import decoders
from transformers import AutoTokenizer

import eval_model
from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import (
    SHIPPED,
    check_vocab,
    copy_tokenizer,
    load_model,
    load_tokenizer,
    open_tokenizer,
    recorded_vocabulary,
    save_weights,
    vocabulary_of,
)
from model.model_minimind import MiniMindForCausalLM
from scripts import convert_model, eval_choice, eval_ppl
from trainer import train_distillation, train_dpo, train_full_sft, train_lora, train_pretrain, train_reward
from trainer.runtime import start
from trainer.runtime.checkpoint import read_checkpoint

ONE_STEP = ("--max_steps=1", "--batch_size=2", "--max_seq_len=256")  # a byte is a token


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, two tokenizers of the same size with other ids, and weights pretrained and fine-tuned with the first."""
    home = write_data(tmp_path_factory.mktemp("home"))
    save_tokenizer(home / "own")
    save_tokenizer(home / "other", shift=1)
    flags = (*ONE_STEP, f"--tokenizer_path={home / 'own'}")
    for script in (train_pretrain, train_full_sft):
        train(script, home / "out", data_of(script, home), *flags)
    for split in ("dpo", "dpo_val"):
        sides = {"chosen": chat("Hi", "Hello.")["conversations"], "rejected": chat("Hi", "No.")["conversations"]}
        write_rows(home / f"{split}.jsonl", [sides] * 4)
    (home / "choice" / "val").mkdir(parents=True)
    (home / "choice" / "val" / "sums.csv").write_text("id,question,A,B,C,D,answer\n0,1+1=?,1,2,3,4,B\n")
    return home


# ------------------------------------------------------------------------------------------------- what is remembered


def test_weights_and_checkpoints_remember_their_tokenizer(home):
    record = json.loads((home / "out" / "full_sft_64.json").read_text())["vocabulary"]
    assert (record["tokenizer"], record["entries"], len(record["hash"])) == ("own", 259, 32)
    assert read_checkpoint(home / "out" / "checkpoints" / "full_sft_64_resume.pth")["vocabulary"] == record
    assert recorded_vocabulary(home / "out" / "pretrain_64.pth") == record == recorded_vocabulary(home / "own")


def test_the_hash_is_of_tokens_and_ids_alone(home, tmp_path):
    own, other = (vocabulary_of(load_tokenizer(home / name)) for name in ("own", "other"))
    assert own["hash"] != other["hash"] and own["entries"] == other["entries"]
    shutil.copytree(home / "own", tmp_path / "renamed")
    path = tmp_path / "renamed" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "another", "model_max_length": 7}))
    assert vocabulary_of(load_tokenizer(tmp_path / "renamed")) == {**own, "tokenizer": "renamed"}


# -------------------------------------------------------------------------------------------- another one is an error


def refused(run, home, *sides):
    """The one sentence of an error that names both tokenizers."""
    with pytest.raises(InputError) as error:
        run()
    message = str(error.value)
    assert "\n" not in message and "'own', 259 entries" in message and "--tokenizer_path" in message
    assert all(str(side) in message for side in sides)


def test_training_from_weights_of_another_tokenizer_is_refused(home, tmp_path):
    for script, data, weights in (
        (train_full_sft, "chats", "pretrain"),
        (train_lora, "chats", "full_sft"),
        (train_dpo, "dpo", "full_sft"),
        (train_reward, "dpo", "full_sft"),
    ):
        path = home / "out" / f"{weights}_64.pth"

        def run(*flags, script=script, data=data, path=path):
            train(script, tmp_path, home / f"{data}.jsonl", *ONE_STEP, f"--from_weight={path}", *flags)

        refused(run, home, path, load_tokenizer().name_or_path, "'model', 6400 entries")
        refused(lambda run=run: run(f"--tokenizer_path={home / 'other'}"), home, path, home / "other")
    assert not list(tmp_path.rglob("*.pth"))
    run(f"--tokenizer_path={home / 'own'}")  # the right one trains
    assert recorded_vocabulary(tmp_path / "reward_64.pth")["tokenizer"] == "own"


def test_a_resume_with_another_tokenizer_is_refused(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "out")
    texts, checkpoint = data_of(train_pretrain, home), tmp_path / "out" / "checkpoints" / "pretrain_64_resume.pth"

    def resume(*flags):
        train(train_pretrain, tmp_path / "out", texts, *ONE_STEP, "--max_steps=2", "--from_resume=1", *flags)

    refused(resume, home, checkpoint, load_tokenizer().name_or_path)
    refused(lambda: resume(f"--tokenizer_path={home / 'other'}"), home, checkpoint, home / "other")
    shutil.copytree(home / "own", tmp_path / "moved")  # a folder may be called otherwise
    resume(f"--tokenizer_path={tmp_path / 'moved'}")
    content = torch.load(checkpoint, weights_only=True)
    del content["vocabulary"]  # of an earlier version
    torch.save(content, checkpoint)
    resume(f"--tokenizer_path={home / 'own'}", "--max_steps=3")


def test_a_teacher_with_another_tokenizer_is_refused(home, tmp_path):
    teacher = home / "out" / "full_sft_64.pth"

    def run(*more):
        flags = [f"--data_path={home / 'chats.jsonl'}", f"--out_dir={tmp_path}", f"--teacher={teacher}", *more]
        train_distillation.main(train_distillation.parse_args([*TINY, "--from_weight=none", *ONE_STEP, *flags]))

    refused(run, home, teacher, load_tokenizer().name_or_path)
    run(f"--tokenizer_path={home / 'own'}")


def readers(home, tmp_path):
    """(script, its flags) for everything that reads weights and a tokenizer."""
    path, common = home / "out" / "full_sft_64.pth", ["--device=cpu", f"--out_dir={home / 'out'}"]
    return [
        (eval_model, [f"--weight={path}", "--prompt=Hi", "--max_new_tokens=2", *common]),
        (eval_ppl, [home / "texts_val.jsonl", f"--weight={path}", "--max_seq_len=256", *common]),
        (eval_choice, [home / "choice", f"--weight={path}", *common]),
        (convert_model, [path, tmp_path / "exported"]),
    ]


@pytest.mark.parametrize("number", range(4))
def test_reading_weights_with_another_tokenizer_is_refused(number, home, tmp_path, capsys):
    script, flags = readers(home, tmp_path)[number]
    for more in ([], [f"--tokenizer_path={home / 'other'}"]):
        code, _, err = ends(script, [*flags, *more], capsys)
        assert code == 1 and err.count("\n") == 1 and "full_sft_64.pth belongs to another tokenizer ('own'" in err
    assert not (tmp_path / "exported").exists()
    code, _, err = ends(script, [*flags, f"--tokenizer_path={home / 'own'}"], capsys)
    assert code == 0 and "error" not in err


def test_an_adapter_remembers_its_tokenizer(home, tmp_path, capsys):
    """Also where the weights below it do not tell theirs."""
    weights = tmp_path / "full_sft_64.pth"
    shutil.copy(home / "out" / weights.name, weights)
    flags = [*TINY, *ONE_STEP, f"--data_path={home / 'chats.jsonl'}", f"--from_weight={weights}"]
    flags += [f"--out_dir={tmp_path}", f"--tokenizer_path={home / 'own'}"]
    train_lora.main(train_lora.parse_args(flags))
    adapter = tmp_path / "lora" / "lora_identity_64.pth"
    assert recorded_vocabulary(adapter) == recorded_vocabulary(home / "own")
    flags = [f"--weight={weights}", f"--lora_name={adapter}", "--prompt=Hi", "--max_new_tokens=2", "--device=cpu"]
    code, _, err = ends(eval_model, flags, capsys)
    assert code == 1 and f"{adapter} belongs to another tokenizer ('own'" in err
    assert ends(eval_model, [*flags, f"--tokenizer_path={home / 'own'}"], capsys)[0] == 0


def test_weights_of_which_nobody_knows_the_tokenizer_pass(home, tmp_path):
    path, tokenizer = tmp_path / "full_sft_64.pth", load_tokenizer()
    shutil.copy(home / "out" / path.name, path)
    model = load_model(path)[0]  # a public .pth: no JSON
    assert open_tokenizer(None, path, model).name_or_path == tokenizer.name_or_path
    info = json.loads((home / "out" / "full_sft_64.json").read_text())
    for record in ({}, {"vocabulary": None}):  # of an earlier version
        info.pop("vocabulary", None)
        path.with_suffix(".json").write_text(json.dumps(info | record))
        check_vocab(tokenizer, model.config, path)


# ------------------------------------------------------------------------------------------------- which one is taken


@pytest.fixture
def folder(home, tmp_path):
    """An export with its own tokenizer beside the weights."""
    convert_model.main(
        convert_model.parse_args(
            [str(home / "out" / "full_sft_64.pth"), str(tmp_path / "folder"), f"--tokenizer_path={home / 'own'}"]
        )
    )
    return tmp_path / "folder"


def test_the_tokenizer_beside_the_weights_is_taken_unless_one_is_named(home, folder, tmp_path, capsys, monkeypatch):
    seen = []
    for module in (eval_model, start):
        monkeypatch.setattr(module, "open_tokenizer", lambda *args: seen.append(open_tokenizer(*args)) or seen[-1])
    for script, flags in readers(home, tmp_path)[:3:2]:  # eval_ppl opens its weights as eval_choice does
        flags = [f"--weight={folder}" if str(flag).startswith("--weight") else flag for flag in flags]
        seen.clear()
        assert ends(script, flags, capsys)[0] == 0
        assert [tokenizer.name_or_path for tokenizer in seen] == [str(folder)]
        code, _, err = ends(script, [*flags, f"--tokenizer_path={home / 'other'}"], capsys)
        assert code == 1 and f"{folder} belongs to another tokenizer" in err


def test_a_folder_goes_back_to_a_pth_with_its_tokenizer(home, folder, tmp_path):
    convert_model.main(convert_model.parse_args([str(folder), str(tmp_path / "back.pth")]))
    record = recorded_vocabulary(tmp_path / "back.pth")
    assert record["hash"] == vocabulary_of(load_tokenizer(home / "own"))["hash"]


def test_beside_a_pth_a_tokenizer_is_taken_too(home, tmp_path):
    shutil.copy(home / "out" / "full_sft_64.pth", tmp_path)
    model = load_model(tmp_path / "full_sft_64.pth")[0]
    shutil.copy(home / "own" / "tokenizer_config.json", tmp_path)  # not a tokenizer yet
    assert len(open_tokenizer(None, tmp_path / "full_sft_64.pth", model)) == 6400
    shutil.copy(home / "own" / "tokenizer.json", tmp_path)
    assert len(open_tokenizer(None, tmp_path / "full_sft_64.pth", model)) == 259


def test_a_folders_own_tokenizer_that_cannot_be_read_gives_way_to_none(folder):
    model = load_model(folder)[0]
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"folder has no tokenizer\.json: name another --tokenizer_path"):
        open_tokenizer(None, folder, model)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    assert len(open_tokenizer(None, folder, model)) == 6400


# ---------------------------------------------------------------------------------------------------- what it must have


@pytest.mark.parametrize(
    ("control", "names", "words"),
    [
        (CONTROL, {}, "no bos_token, no eos_token, no pad_token, which"),
        (CONTROL, {**NAMES, "pad_token": None}, "no pad_token, which"),
        (("<|endoftext|>",), dict.fromkeys(NAMES, "<|endoftext|>"), r"no <\|im_start\|>, no <\|im_end\|>, which"),
        (("<s>", "</s>", "<unk>"), {"bos_token": "<s>", "eos_token": "</s>"}, r"no pad_token, no <\|im_start\|>, no <"),
    ],
)
def test_what_a_tokenizer_lacks_is_named_on_loading(control, names, words, tmp_path):
    save_tokenizer(tmp_path, control, {name: token for name, token in names.items() if token})
    with pytest.raises(InputError, match=rf"the tokenizer in {tmp_path} has {words}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    """Llama's: its "▁the" and "<0xE4>" are no bytes in the names of tokens."""
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    for decoder in (decoders.Sequence(pieces), decoders.Metaspace(), decoders.WordPiece()):
        save_tokenizer(tmp_path, decoder=decoder)
        with pytest.raises(InputError, match="is not byte-level"):
            load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, decoder=decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]))
    assert len(load_tokenizer(tmp_path)) == 259


# ---------------------------------------------------------------------------------------------------------- special ids

TURNED = ("<|im_end|>", "<x>", "<|endoftext|>", "<y>", "<|im_start|>")


def test_a_new_model_has_the_special_ids_of_its_tokenizer(home, tmp_path):
    save_tokenizer(tmp_path / "turned", TURNED)
    save_tokenizer(tmp_path / "two", TURNED, {**NAMES, "eos_token": "<x>"})
    for name, expected in (("turned", (4, 0, 2)), ("two", (4, [1, 0], 2))):
        flags = (*ONE_STEP, f"--tokenizer_path={tmp_path / name}")
        model = train(train_pretrain, tmp_path / name, data_of(train_pretrain, home), *flags).model
        again = load_model(tmp_path / name / "pretrain_64.pth")[0]
        for holder in (model.config, model.generation_config, again.config, again.generation_config):
            assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == expected


def test_public_weights_take_the_special_ids_of_the_tokenizer_that_is_named(tmp_path):
    save_tokenizer(tmp_path / "turned", TURNED)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1))
    torch.save(model.state_dict(), tmp_path / "public.pth")
    again = load_model(tmp_path / "public.pth")[0]
    open_tokenizer(tmp_path / "turned", tmp_path / "public.pth", again)
    assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (4, 0, 2)
    known = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, eos_token_id=[9, 2]))
    keys = {"stage": "x", "tokens_seen": 0, "data_path": "x", "data_hash": "h", "trained_length": 9}
    save_weights(known, tmp_path / "known.pth", **keys)
    again = load_model(
        tmp_path / "known.pth", preset="minimind2-small", config_overrides={"hidden_size": 64, "num_hidden_layers": 1}
    )[0]
    open_tokenizer(tmp_path / "turned", tmp_path / "known.pth", again)
    assert again.config.eos_token_id == [9, 2]  # what is known stays


@pytest.mark.parametrize(
    ("own", "generation", "union"),
    [(2, [7, 2], [2, 7]), ([2, 5], 7, [2, 5, 7]), (2, None, 2), (None, 7, 7), (2, 2, 2), (None, None, None)],
)
def test_end_tokens_of_a_folder_are_those_of_both_files(own, generation, union, tmp_path):
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, vocab_size=97))
    model.save_pretrained(tmp_path)
    for name, ids in (("config", own), ("generation_config", generation)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    again = load_model(tmp_path)[0]
    assert again.config.eos_token_id == again.generation_config.eos_token_id == union


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [[2]]}'])
def test_a_damaged_generation_config_is_named(content, tmp_path):
    MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, vocab_size=97)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: "):
        load_model(tmp_path)


# --------------------------------------------------------------------------------------------------------- on an export


def test_an_exported_tokenizer_is_what_transformers_4_reads(tmp_path):
    """Its template within tokenizer_config.json, a class that is known there, no list where a mapping is meant."""
    source, target = tmp_path / "five", tmp_path / "four"
    tokenizer = save_tokenizer(source, (*CONTROL, "<extra>"), {**NAMES, "extra_special_tokens": ["<extra>"]})
    tokenizer.chat_template = "{{ messages[0].content }} 好"
    tokenizer.save_pretrained(source)
    written = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (source / "chat_template.jinja").exists() and "chat_template" not in written  # as transformers 5 writes it
    written["tokenizer_class"] = "TokenizersBackend"
    (source / "tokenizer_config.json").write_text(json.dumps(written))
    target.mkdir()
    copy_tokenizer(source, target)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == "{{ messages[0].content }} 好"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in config
    assert {name: config[name] for name in NAMES} == NAMES
    assert config["additional_special_tokens"] == ["<extra>"] and "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(target)
    assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_ids == tokenizer.all_special_ids
    assert again.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi 好"


def test_the_shipped_tokenizer_is_exported_as_it_is(tmp_path):
    copy_tokenizer(SHIPPED, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((SHIPPED / name).read_text())

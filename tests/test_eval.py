"""first-eval against torch, sacrebleu, rouge-score and FirstLlama's own chat; intervals, masks and refusals."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import tiny
from rouge_score import rouge_scorer

from first_convert import convert
from pyfirst import FirstLlama, masks, scores
from pyfirst.cli.eval import _clear, _note, build_parser, main
from pyfirst.errors import InputError
from pyfirst.evaluation import Scorer, evaluate, mode_mask, plan
from pyfirst.layers import evenly
from pyfirst.tasks import gather, read_examples

import llama_cpp  # isort: skip  (after pyfirst, which points it at our library)

F32 = {"type_k": 0, "type_v": 0}
ROWS = [
    {"task": "greet", "prompt": "the quick brown fox", "references": ["jumps over the lazy dog", "jumps"]},
    {"task": "greet", "prompt": "In 2024 there were", "references": ["365 days, and I'm sure"]},
    {"task": "code", "prompt": "def f(x):\n    return", "response": "x + 1\n#### 1,024"},
    {"task": "code", "prompt": "日本語 🙂", "references": ["本語のテキストです。", "#### 7"]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def plain(tiny_model) -> str:
    """A GGUF without routers."""
    return str(tiny_model("llama")[1])


def said(capfd, *argv: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, native output included."""
    code = main([*map(str, argv)])
    return code, *capfd.readouterr()


def torch_ids(folder: Path, row: dict) -> tuple[list[int], list[int]]:
    """Prompt and answer as training tokenises them."""
    from transformers import AutoTokenizer

    from pyfirst.training.data import encode

    answer = row.get("references", [row.get("response")])[0]
    return encode(AutoTokenizer.from_pretrained(folder), row["prompt"], answer)


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_cross_entropy_equals_torch(prefill, files, data):
    import torch

    folder, recipe, path = files[prefill]
    net = tiny.load(folder)
    answers: list[dict] = []
    result = evaluate(
        [str(path)],
        [data],
        compare=["dense", "static:0,2", "routed", "even:2"],
        metrics=["ce"],
        on_answer=answers.append,
        **F32,
    )
    forced = {"dense": [1, 1, 1, 1], "static:0,2": [0, 1, 0, 1], "even:2": [1, 0, 0, 1]}
    seen = set()
    for system in result["systems"]:
        total, count = 0.0, 0
        for row, found in zip(ROWS, [a for a in answers if a["system"] == system["name"]], strict=True):
            prompt, answer = torch_ids(folder, row)
            mask = forced.get(system["mode"])
            if mask is None:
                mask = tiny.decide(folder, recipe, prompt)[0]
                seen.add(mask.tobytes())
            assert found["skipped"] == np.flatnonzero(~np.array(mask, bool)).tolist()
            logits = tiny.gold(net, mask, prompt, answer[:-1], prefill)[len(prompt) - 1 :]
            log_p = torch.log_softmax(torch.tensor(logits), -1)[range(len(answer)), answer].sum().item()
            assert found["reference_tokens"] == len(answer) and found["tokens"] == 0
            assert found["log_likelihood"] / len(answer) == pytest.approx(log_p / len(answer), abs=1e-3)
            total, count = total + log_p, count + len(answer)
        assert system["total"]["ce"]["value"] == pytest.approx(-total / count, abs=1e-3)
        assert system["prefill"] == prefill
    assert len(seen) > 1


@pytest.mark.parametrize("prefill", ["full", "skip"])
def test_answers_are_the_chats(prefill, files, data):
    """Scoring the reference in between, and what other systems have read, leave no trace in the answers."""
    path = str(files[prefill][2])
    answers: list[dict] = []
    evaluate([path], [data], compare=["dense", "routed", "static:1"], max_tokens=12, on_answer=answers.append, **F32)
    llm = FirstLlama(path, n_ctx=512, **F32)
    for i, row in enumerate(ROWS):
        for mode, mask in (("dense", [1, 1, 1, 1]), ("routed", None), ("static:1", [1, 0, 1, 1])):
            found = [a for a in answers if a["system"] == mode][i]
            expected = llm.create_chat_completion(
                [{"role": "user", "content": row["prompt"]}], max_tokens=12, temperature=0, mask=mask
            )
            assert found["text"] == expected["choices"][0]["message"]["content"]
            assert found["tokens"] == expected["usage"]["completion_tokens"]
            assert len(found["text"]) > 3
            assert found["skipped"] == expected["first"]["skipped"]
    llm.close()


@pytest.mark.parametrize("prefill", ["full", "skip"])
@pytest.mark.parametrize("kind", ["plain", "routed"])
def test_equal_masks_give_equal_answers(kind, prefill, files, plain, tmp_path):
    """To the last bit: how many tokens of a prompt are computed at once must not tell the first system apart."""
    path, answers = tmp_path / "long.jsonl", list[dict]()
    rows = [{"prompt": "the quick brown fox jumps " * n, "response": "over the lazy dog"} for n in range(10, 30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    same = ["static:1,2", "static:2,1", "static:1,2,1"]
    modes = [same[0], *(["routed"] if kind == "routed" else []), *same[1:]]
    gguf = plain if kind == "plain" else str(files["full"][2])
    result = evaluate([gguf], [path], compare=modes, prefill=prefill, metrics=["ce"], on_answer=answers.append)
    found = [[a["log_likelihood"] for a in answers if a["system"] == mode] for mode in same]
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 10
    gap = next(s for s in result["systems"] if s["mode"] == same[1])["total"]["ce"]["difference"]
    assert gap == {"value": 0, "low": 0, "high": 0}


def test_a_difference_that_is_printed_as_0_has_no_star():
    for value, star in ((0.0004, ""), (-0.0004, ""), (0.0006, "*"), (-0.0006, "*")):
        assert _clear({"value": value, "low": value * 0.9, "high": value * 1.1}, 3) == star
    assert _clear({"value": 0.04, "low": 0.03, "high": 0.05}, 1) == _clear(None, 1) == ""


def test_prompts_are_the_chats(plain, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama")[0])
    llm = Scorer(plain, routing=False)
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert llm.prompt_tokens("hello") == ids
    assert llm.end_of_turn() == tokenizer.eos_token_id
    llm.close()


def test_a_file_without_template_gets_plain_text(plain, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    from first_convert.ggufio import Entry, Gguf, rewrite
    from pyfirst.training.data import encode

    path = tmp_path / "none.gguf"
    # A base model whose vocabulary has an end of turn as well, which it never saw.
    extra = Entry("tokenizer.ggml.eot_token_id", "UINT32", 1)
    rewrite(Gguf(plain), path, [extra], lambda key: key not in ("tokenizer.chat_template", extra.name))
    llm = Scorer(path, routing=False)
    assert llm.prompt_tokens("hello") == llm.tokenize(b"hello", add_bos=True, special=True)
    assert llm.end_of_turn() == llm.token_eos() != llama_cpp.llama_vocab_eot(llm._model.vocab)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama")[0])
    tokenizer.chat_template = None
    assert llm.answer_tokens(" lazy dog", llm.end_of_turn()) == encode(tokenizer, "over the", " lazy dog")[1]
    llm.close()


TEXTS = ["the lazy dog jumps over the fox.", "x + 1", "Über uns der Himmel", "", "#### 42"]
REFERENCES = [
    ["the quick dog jumps over the lazy fox.", "a fox"],
    ["x + 1"],
    ["über uns ist der Himmel", "Himmel"],
    ["days"],
    ["It is\n#### 42", "42", "####  42 "],
]


def test_scores_equal_the_packages_own():
    everything = np.arange(len(TEXTS))
    columns = [[row[i] if i < len(row) else None for row in REFERENCES] for i in range(3)]
    expected = sacrebleu.corpus_bleu(TEXTS, columns).score
    assert scores.bleu(TEXTS, REFERENCES).of(everything) == pytest.approx(expected)
    expected = sacrebleu.corpus_chrf(TEXTS, columns).score
    assert scores.chrf(TEXTS, REFERENCES).of(everything) == pytest.approx(expected)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
    for kind in ("rouge1", "rougeL"):
        best = [
            max(scorer.score(target, text)[kind].fmeasure for target in targets)
            for targets, text in zip(REFERENCES, TEXTS, strict=True)
        ]
        assert scores.rouge(TEXTS, REFERENCES, kind).of(everything) == pytest.approx(100 * np.mean(best))
    # A subset is that corpus, not a mean of sentences.
    some = np.array([0, 2])
    expected = sacrebleu.corpus_bleu([TEXTS[i] for i in some], [[REFERENCES[i][j] for i in some] for j in (0, 1)]).score
    assert scores.bleu(TEXTS, REFERENCES).of(some) == pytest.approx(expected)


def test_a_resampled_corpus_is_scored_as_that_corpus():
    weights = np.array([[2.0, 0, 1, 0, 0]])
    texts, references = [TEXTS[i] for i in (0, 0, 2)], [REFERENCES[i] for i in (0, 0, 2)]
    columns = [[row[i] for row in references] for i in (0, 1)]
    found = scores.bleu(TEXTS, REFERENCES).resampled(weights, np.arange(5))
    assert found == pytest.approx([sacrebleu.corpus_bleu(texts, columns).score])


def test_exact_matches_and_final_numbers():
    everything = np.arange(len(TEXTS))
    assert scores.exact(TEXTS, REFERENCES).of(everything) == pytest.approx(2 / 5)  # the second and the last
    assert scores.final_answers(TEXTS, REFERENCES).of(everything) == 1  # one example has a number
    assert np.isnan(scores.final_answers(TEXTS, REFERENCES).of(np.array([0, 1])))
    for text, number in (
        ("#### 1,024", "1024"),
        ("so\n####  $12.50 dollars", "12.5"),
        ("#### -3.", "-3"),
        ("#### 10", "10"),
        ("#### 1\n#### 2", "2"),
        ("42", None),
    ):
        assert scores.final_number(text) == number


def test_intervals_hold_the_mean_and_shrink():
    generator = np.random.default_rng(0)
    widths = []
    for n in (20, 200, 2000):
        values = generator.normal(5, 2, n)
        found = scores.estimate(scores.mean(values), scores.draw(["a"] * n, 1), np.arange(n))
        assert found["value"] == pytest.approx(values.mean())
        assert found["low"] < found["value"] < found["high"]
        # what normal theory says of a mean
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / n**0.5, rel=0.15)
        widths.append(found["high"] - found["low"])
    assert widths[0] > widths[1] > widths[2]


def test_differences_are_paired():
    generator = np.random.default_rng(0)
    a = generator.normal(0, 10, 100)
    b = a + 1 + generator.normal(0, 0.1, 100)
    weights = scores.draw(["a"] * 100, 1)
    found = scores.estimate(scores.mean(b), weights, np.arange(100), scores.mean(a))
    assert found["high"] - found["low"] > 3  # each alone says little
    assert 0.95 < found["difference"]["low"] < 1 < found["difference"]["high"] < 1.05
    same = scores.estimate(scores.mean(a), weights, np.arange(100), scores.mean(a))["difference"]
    assert same == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("tasks", "counted", "several"),
    [("aab", 3, True), ("aab", 2, True), ("ab", 2, False), ("a", 1, False), ("aa", 1, False)],
)
def test_one_example_has_no_interval(tasks, counted, several):
    """Nor have several that are each alone in its task, nor those of which one counts for the score."""
    ones = (np.arange(len(tasks)) < counted).astype(float)
    rows = [np.stack([ones * np.arange(1, len(tasks) + 1) * factor, ones], 1) for factor in (1, 2)]
    found = scores.estimate(
        scores.Statistic(rows[1]), scores.draw(tasks, 0), np.arange(len(tasks)), scores.Statistic(rows[0])
    )
    assert found["value"] == counted + 1 and found["difference"]["value"] == (counted + 1) / 2
    for part in (found, found["difference"]):
        assert (part["low"] is not None, part["high"] is not None) == (several, several)


def test_resamples_keep_each_tasks_size_and_the_seed():
    tasks = ["a"] * 3 + ["b"] * 5
    weights = scores.draw(tasks, 7, 50)
    assert (weights[:, :3].sum(1) == 3).all() and (weights[:, 3:].sum(1) == 5).all()
    assert (weights == scores.draw(tasks, 7, 50)).all() and (weights != scores.draw(tasks, 8, 50)).any()


def test_guessing_tasks_from_masks():
    a, b = [1, 1, 0, 1], [1, 0, 1, 1]
    tasks = ["x"] * 4 + ["y"] * 4
    masks = np.array([a, a, a, b, b, b, b, b], bool)
    for modal in (False, True):
        assert scores.guess_tasks(np.array([a] * 4 + [b] * 4, bool), tasks, modal).mean() == 1
        assert scores.guess_tasks(np.array([a] * 8, bool), tasks, modal).mean() == 0.5
        # left out, the odd one of x looks like y
        assert scores.guess_tasks(masks, tasks, modal).tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
        # alone in its task, it can only be taken for another
        assert scores.guess_tasks(np.array([a, b, b], bool), ["x", "y", "y"], modal)[0] == 0
    # All different: the one in the middle, not the one that skips most.
    rows = np.array([[0, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]], bool)
    assert scores.modal_mask(rows).tolist() == [True, False, True, True]
    found = scores.compare_tasks(masks, tasks, scores.draw(tasks, 0))
    assert found["modal"] == {"x": [2], "y": [1]} and found["differ"] == {"x / y": 0.5} and found["chance"] == 0.5
    assert found["guess"]["mean"]["value"] == pytest.approx(7 / 8)
    assert scores.compare_tasks(masks, ["x"] * 8, scores.draw(["x"] * 8, 0)) is None
    # One that is alone in its task cannot be guessed, so it does not count as a wrong guess.
    tasks = ["x", "x", "y", "y", "z"]
    found = scores.compare_tasks(np.array([a, a, b, b, [0, 1, 1, 1]], bool), tasks, scores.draw(tasks, 0))
    assert found["guess"]["mean"]["value"] == found["guess"]["modal"]["value"] == 1 and found["chance"] == 1 / 3
    assert scores.compare_tasks(masks[3:5], ["x", "y"], scores.draw(["x", "y"], 0))["guess"] is None


def test_tasks_with_masks_of_their_own(tiny_model, tmp_path, capfd):
    """A router that fires on one token of the prompt gives each task its own mask."""
    folder, base = tiny_model("llama")
    rows = [{"task": t, "prompt": t * n, "response": "x"} for t in ("@", "7") for n in (8, 12, 16)]
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for name, row in (("first", rows[0]), ("last", rows[-1])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    net = tiny.load(folder)
    means = {}
    for row in rows:
        ids = torch_ids(folder, row)[0]
        hidden = tiny._forward(net, [1, 1, 1, 1], ids, 0)[1][1].astype(np.float64)
        means.setdefault(row["task"], []).append(hidden.mean(0))
    centre = np.mean([np.mean(m, 0) for m in means.values()], 0)
    direction = np.mean(means["@"], 0) - np.mean(means["7"], 0)
    direction *= 0.3 / np.abs(np.concatenate(list(means.values())) @ direction).max()
    weight, bias = np.zeros((4, tiny.WIDTH), np.float32), np.full(4, 5, np.float32)
    weight[1], bias[1] = direction, -centre @ direction
    recipe = tiny.recipe(tmp_path / "recipe", folder, weight=weight, bias=bias)
    convert.convert(base_gguf=base, first=recipe, outfile=tmp_path / "two.gguf")
    argv = ("-m", tmp_path / "two.gguf", "--data", path, "--metrics", "ce", "--compare", "routed", "dense")
    code, out, err = said(capfd, *argv, "--format", "json")
    assert code == 0, err
    routed, dense = json.loads(out)["systems"]
    assert routed["total"]["distinct_masks"] == 2
    assert routed["masks"]["modal"] == {"@": [], "7": [1]} and routed["masks"]["differ"] == {"@ / 7": 0.25}
    assert routed["masks"]["guess"]["mean"]["value"] == routed["masks"]["guess"]["modal"]["value"] == 1
    assert dense["masks"]["guess"]["mean"]["value"] == 0.5 and dense["total"]["distinct_masks"] == 1
    assert routed["total"]["kept"]["value"] == pytest.approx(0.875)
    code, out, err = said(capfd, *argv, "--data", tmp_path / "first.jsonl", tmp_path / "last.jsonl")
    assert code == 0 and "@ / 7 differ" in out and "guessed" not in out
    code, out, err = said(capfd, *argv)
    assert code == 0 and "task guessed from the nearest mean mask: 100.0% right" in out
    assert "@ / 7 differ on 25% of the layers" in out


def test_the_json_holds_every_score_of_every_task(files, plain, data, capfd):
    argv = [
        "-m",
        str(files["full"][2]),
        f"{plain}=static:1",
        "--data",
        data,
        "--compare",
        "dense",
        "routed",
        "random:1",
    ]
    code, out, err = said(capfd, *argv, "-n", 6, "--exact", "--format", "json", "--seed", 4)
    assert code == 0 and err == ""
    result = json.loads(out)
    assert "see first-bench" in _note(result)
    names = [system["name"] for system in result["systems"]]
    assert names == ["full dense", "full routed", "full random:1", "f32 static:1"]
    assert result["tasks"] == {"greet": 2, "code": 2}
    metrics = {"layers", "kept", "tokens_per_s", "length", *scores.DEFAULT_METRICS, "exact", "answer"}
    for system in result["systems"]:
        for group in (system["total"], *system["by_task"].values()):
            assert set(group) == metrics | {"examples", "distinct_masks"}
            for name in metrics:
                alone = system["name"] == "full dense" or (name == "tokens_per_s" and system["name"] == "f32 static:1")
                assert (group[name]["difference"] is None) == alone
        assert system["by_task"]["greet"]["answer"]["value"] is None  # no '####' there
    dense, _, drawn, static = result["systems"]
    assert dense["skip_layers"] == [] and static["skip_layers"] == [1]
    assert drawn["skip_layers"] == np.flatnonzero(~mode_mask("random:1", 4, 4)).tolist()
    # The same weights in another file, so the same cross-entropy as one file with both modes.
    both = evaluate([plain], [data], compare=["static:1"], metrics=["ce"])["systems"][0]
    assert both["total"]["ce"]["value"] == pytest.approx(static["total"]["ce"]["value"], abs=1e-5)


def test_cross_entropies_of_other_tokens_are_not_compared(plain, data, tmp_path, capfd):
    """Half as many tokens for the same text have twice the nats each."""
    from first_convert.ggufio import Entry, Gguf, rewrite

    path, merges = tmp_path / "letters.gguf", Entry("tokenizer.ggml.merges", "ARRAY", ["t h"], "STRING")
    rewrite(Gguf(plain), path, [merges], lambda key: key != merges.name)
    argv = ("--data", data, "--metrics", "ce", "--format", "json", "--compare", "dense", "static:1")
    code, out, err = said(capfd, "-m", plain, path, *argv)
    assert code == 0, err
    names = ["letters dense", "letters static:1"]
    totals = {system["name"]: system["total"] for system in json.loads(out)["systems"]}
    assert [name for name in totals if totals[name]["ce"]["difference"] is None] == ["f32 dense", *names]
    assert len(err.splitlines()) == 1 and "another number of tokens" in err and ", ".join(names) in err
    assert totals["letters dense"]["layers"]["difference"]["value"] == 0


def test_tables_and_files(plain, data, tmp_path, capfd):
    argv = ["-m", plain, "--data", data, "--compare", "dense", "even:1", "-n", 6, "--limit", 3]
    code, out, err = said(capfd, *argv)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert "greet, 2 examples" in lines and "code, 1 examples" in lines and "all tasks, 3 examples" in lines
    header = next(line for line in lines if line.startswith("system"))
    assert header.split() == ["system", "layers", "masks", "tok/s", "CE", "BLEU", "chrF", "ROUGE-1", "ROUGE-L"]
    assert any(line.startswith("even:1") and "3.0 (75%)" in line for line in lines)
    assert "paired" in lines[-1] and "first-bench" not in lines[-1] and max(map(len, lines[:-1])) < 130
    target, predictions = tmp_path / "table.md", tmp_path / "answers.jsonl"
    code, out, err = said(capfd, *argv, "--format", "markdown", "--out", target, "--predictions", predictions)
    assert code == 0 and out == "" and err == ""
    rows = [line for line in target.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 * 2 and len({row.count("|") for row in rows}) == 1
    answers = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 6 and answers[1]["system"] == "even:1" and answers[1]["skipped"] == [2]


def test_wrong_input_leaves_the_files_of_an_earlier_run(plain, data, tmp_path, capfd):
    out, predictions = tmp_path / "table.md", tmp_path / "answers.jsonl"
    predictions.write_text("precious", encoding="utf-8")
    argv = ("-m", plain, "--out", out, "--predictions", predictions, "--metrics", "ce")
    assert said(capfd, *argv, "--data", tmp_path / "missing")[0] == 2
    assert predictions.read_text(encoding="utf-8") == "precious" and not out.exists()
    assert said(capfd, *argv, "--data", data)[0] == 0
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == len(ROWS) and out.exists()


def test_what_is_read_is_never_written_over(plain, data, tmp_path, capfd):
    model, tasks = shutil.copy(plain, tmp_path / "model.gguf"), shutil.copy(data, tmp_path / "tasks.jsonl")
    before = Path(model).read_bytes(), Path(tasks).read_bytes()
    for option, path in (("--out", model), ("--predictions", tasks), ("--predictions", tmp_path / "." / "model.gguf")):
        for names in (
            ("-m", model),
            ("-m", f"{model}=dense"),
            ("-m", plain, "--compare", "dense", model),
            ("-m", plain, "--compare", "dense", f"{model}=dense"),
        ):
            code, out, err = said(capfd, *names, "--data", tasks, "--metrics", "ce", option, path)
            assert code == 2 and out == "" and len(err.splitlines()) == 1 and "is read" in err
    both = ("--out", tmp_path / "x", "--predictions", tmp_path / "x")
    assert said(capfd, "-m", model, "--data", tasks, "--metrics", "ce", *both)[0] == 2
    assert (Path(model).read_bytes(), Path(tasks).read_bytes()) == before and not (tmp_path / "x").exists()


def test_rouge_of_a_language_does_not_depend_on_what_else_is_scored():
    texts = ["我能吞下玻璃", *["the quick brown fox jumps over"] * 3, "I've eaten 3.5 e_mails"]
    references = [["我能吞下玻璃而不伤身体"], *[["the quick brown dog jumps over it all"]] * 3, ["I have 3.5 e mails"]]
    english = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
    for kind in ("rouge1", "rougeL"):
        found = scores.rouge(texts, references, kind).rows[:, 0]
        assert found[0] == pytest.approx(100 * 2 * 6 / (6 + 11))  # 6 characters of 11
        own = [english.score(targets[0], text)[kind].fmeasure for targets, text in zip(references, texts, strict=True)]
        assert found[1:] == pytest.approx([100 * value for value in own[1:]])


@pytest.mark.parametrize(
    ("text", "reference", "common"),
    [
        ("की", "के", 0),  # Hindi: the same consonant with another vowel
        ("मेरा नाम राम है", "मेरी नाम राम है", 3),
        ("தமிழ் மொழி", "தமிழ் மழை", 1),
        ("كَتَبَ كِتَاب", "كُتِبَ كِتَاب", 1),  # he wrote, it was written
        ("\u0439\u043e\u0434", "\u0438\u0306\u043e\u0434", 1),  # one character or two, the same letter
    ],
)
def test_marks_belong_to_the_word_before_them(text, reference, common):
    assert len(text.split()) == len(reference.split())
    found = scores.rouge([text], [[reference]], "rouge1").rows[0, 0]
    assert found == pytest.approx(100 * common / len(text.split()))


@pytest.mark.parametrize(
    "text", ["Сумма равна тридцати одному.", "合計は三十一です。", "합계는 서른하나입니다.", "The sum."]
)
def test_rouge_has_words_in_every_script(text):
    other = text[: len(text) // 2]
    for kind in ("rouge1", "rougeL"):
        assert scores.rouge([text], [[text]], kind).rows[0, 0] == pytest.approx(100)
        assert 0 < scores.rouge([other], [[text]], kind).rows[0, 0] < 100


def test_without_a_mode_files_are_routed_if_they_can(files, plain):
    full, skip = (str(files[prefill][2]) for prefill in ("full", "skip"))
    assert [s.mode for s in plan([full, plain])] == ["routed", "dense"]
    systems = plan([plain], ["dense", f"{full}=routed", skip])
    assert [s.name for s in systems] == ["f32 dense", "full routed", "skip routed"]


def test_layers_of_the_modes():
    for n_layer in (4, 5, 16, 30, 32):
        for n_skip in range(1, n_layer - 1):
            for mode in ("even", "random"):
                skipped = np.flatnonzero(~mode_mask(f"{mode}:{n_skip}", n_layer, 0))
                assert len(skipped) == n_skip and skipped[0] > 0 and skipped[-1] < n_layer - 1
    assert evenly(range(1, 29), 7) == [3, 7, 11, 15, 19, 23, 27]
    assert (mode_mask("random:7", 30, 0) == mode_mask("random:7", 30, 0)).all()
    assert (mode_mask("random:7", 30, 0) != mode_mask("random:7", 30, 1)).any()


def test_lines_of_a_data_file(tmp_path):
    path = tmp_path / "poems.test.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\n{"prompt": "c", "references": ["d", "e"]}')
    first, second = read_examples(path)
    assert first.task == "poems" and first.references == ["b"] and second.references == ["d", "e"]
    assert second.where == f"{path}:3" and len(read_examples(path, 1)) == 1
    path.write_text(json.dumps({"task": "a\nb", "prompt": "a", "response": "b"}), encoding="utf-8")
    assert read_examples(path)[0].task == "a b"  # a row of a table stays one line
    row = {
        "task": None,
        "prompt": "a",
        "response": "b",
        "references": None,
    }  # what a table has for a cell that is empty
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_examples(path)[0].references == ["b"]
    for packed in (gzip.compress(path.read_bytes()), json.dumps(row).encode("utf-16")):
        path.write_bytes(packed)
        with pytest.raises(InputError, match=r"jsonl:1: not UTF-8 text \(byte \d\); gzip or UTF-16"):
            read_examples(path)


def test_files_that_fall_into_one_task_by_their_names_are_told(tmp_path, caplog):
    row = {"prompt": "a", "response": "b"}
    for name, task in (("en/test", None), ("de/test", None), ("fr/test", "fr"), ("x.1", "x"), ("x.2", "x")):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row | ({"task": task} if task else {})))
    for names, said_of in (
        (["en/test", "de/test", "fr/test"], ["en/test", "de/test"]),
        (["x.1", "x.2", "en/test"], []),  # shards, whose rows say what they are
    ):
        caplog.clear()
        tasks = [example.task for example in gather([tmp_path / f"{name}.jsonl" for name in names], read_examples)]
        assert tasks == (["test", "test", "fr"] if said_of else ["x", "x", "test"])
        assert len(caplog.messages) == bool(said_of)
        assert all(str(tmp_path / f"{name}.jsonl") in caplog.messages[0] for name in said_of)
        assert "fr/test" not in caplog.text
    assert [task for task, _ in masks.prompts(["p"], [tmp_path / "x.1.jsonl"])] == ["prompt", "x"]
    with pytest.raises(InputError, match="given twice"):
        masks.prompts([], [tmp_path / "x.1.jsonl", tmp_path / "en" / ".." / "x.1.jsonl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{missing}"], "no such file"),
        (["--data", "{folder}"], "not a file"),
        (["--data", "{good}", "{folder}/../good"], "given twice"),
        (["--data", "{empty}"], "no examples"),
        (["--data", "{broken}"], "broken:2: not valid JSON"),
        (["--data", "{bare}"], "bare:1: expected 'references'"),
        (["--data", "{list}"], "list:1: expected an object"),
        (["--data", "{no text}"], "no text:1: the response"),
        (["--data", "{binary}"], "binary:1: not UTF-8"),
        (["--data", "{deep}"], "deep:1: not valid JSON"),
        (["--data", "{half}"], "half:1: half of a UTF-16 pair"),
        (["--data", "{long}"], "long:1: prompt ("),
        (["-m", "{missing}"], "no such file"),
        (["-m", "{binary}"], "not a usable GGUF"),
        (["--compare", "fast"], "unknown mode 'fast'"),
        (["-m", "{plain}=fast"], "unknown mode 'fast'"),
        (["-m", "{plain}="], "unknown mode ''"),
        (["--compare", "{plain}="], "unknown mode ''"),
        (["--compare", "static:1,4"], "layer 4, the model has layers 0 to 3"),
        (["--compare", "static:x"], "expected layer numbers"),
        (["--compare", "even:3"], "from 1 to 2"),
        (["--compare", "random:0"], "from 1 to 2"),
        (["--compare", "routed"], "no routers"),
        (["--compare", "dense", "dense"], "twice"),
        (["--threshold", "0.5"], "no system is routed"),
        (["--skip", "20%"], "no system is routed"),
        (["--skip", "much"], "--skip is 'much'"),
        (["--skip", "20%", "--threshold", "0.5"], "exclude each other"),
        (["-n", "0"], "-n is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["-t", "0"], "-t is 0"),
        (["-c", "1"], "-c is 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "{missing}/x"], "No such file"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, plain, data, tmp_path, capfd):
    good = json.dumps(ROWS[0])
    for name, content in (
        ("good", good),
        ("empty", "\n"),
        ("broken", good + "\n{"),
        ("bare", '{"prompt": "x"}'),
        ("list", "[1]"),
        ("deep", "[" * 100_000),
        ("half", '{"prompt": "x", "response": "x", "task": "\\ud800"}'),
        ("no text", '{"prompt": "x", "references": [" "]}'),
        ("long", json.dumps({"prompt": "word " * 600, "response": "x"})),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00rubbish")
    (tmp_path / "folder").mkdir()
    places = {name.name: str(name) for name in tmp_path.iterdir()}
    places |= {"plain": plain, "missing": str(tmp_path / "missing")}
    options = [option.format(**places) for option in options]
    options += [] if "-m" in options else ["-m", plain]
    options += [] if "--data" in options else ["--data", data]
    code, out, err = said(capfd, *options)
    assert code == 2 and out == "", err
    assert len(err.splitlines()) == 1 and err.startswith("first-eval: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("metric", "package", "install"),
    [
        ("bleu", "sacrebleu.metrics", "[eval]"),
        ("rougeL", "rouge_score.rouge_scorer", "[eval]"),
        ("bertscore", "bert_score", "bert-score"),
    ],
)
def test_a_missing_package_says_how_to_install_it(metric, package, install, plain, data, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = said(capfd, "-m", plain, "--data", data, "--metrics", metric)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert f"'{package.partition('.')[0]}'" in err and "pip install" in err and install in err
    # Cross-entropy needs none of them.
    assert said(capfd, "-m", plain, "--data", data, "--metrics", "ce")[0] == 0


def test_bertscore_where_it_is_installed(plain, data, monkeypatch):
    class Stub:
        class BERTScorer:
            def __init__(self, **options):
                assert options == {"lang": "en"}

            def score(self, texts, references):
                assert len(texts) == len(references) == len(ROWS) and isinstance(references[0], list)
                return None, None, np.array([0.5, 0.6, 0.7, 0.8])

    monkeypatch.setitem(sys.modules, "bert_score", Stub)
    result = evaluate([plain], [data], metrics=["bertscore"], max_tokens=2)
    assert result["systems"][0]["total"]["bertscore"]["value"] == pytest.approx(65)


def test_bertscore_of_a_named_model_compares_the_layer_that_suits_it(tiny_model, monkeypatch):
    """bert-score knows a layer for some names only, and fails with a KeyError for all others."""
    asked: list[dict] = []

    stub = SimpleNamespace(
        utils=SimpleNamespace(model2layers={"roberta-large": 17, "microsoft/deberta-base": 9}),
        BERTScorer=lambda **options: asked.append(options),
    )
    monkeypatch.setitem(sys.modules, "bert_score", stub)
    folder = str(tiny_model("llama")[0])
    for model in ("roberta-large", "/disk/deberta-base", folder):
        scores.bertscorer(model)
    assert [options["num_layers"] for options in asked] == [17, 9, 4]
    assert [options["model_type"] for options in asked] == ["roberta-large", "/disk/deberta-base", folder]


def test_unknown_metric(plain, data):
    with pytest.raises(InputError, match="unknown metric 'meteor'"):
        evaluate([plain], [data], metrics=["meteor"])


def test_help_is_quick_and_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    said_help = " ".join(capsys.readouterr().out.split())
    assert "first-eval -m smollm2-first.gguf" in said_help and "static:3,5,7" in said_help
    code = "import sys, pyfirst.cli.eval; sys.exit('llama_cpp' in sys.modules or 'sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

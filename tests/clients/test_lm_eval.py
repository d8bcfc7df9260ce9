"""lm-eval's local-completions scores what PyTorch, run by our own code, scores."""

import json
import math

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

import cla_export
from cla_export.engines.torch import TorchExecutor
from cla_export.models.checkpoint import load_model, open_checkpoint

QUESTIONS, WRONG = 8, 3  # wrong answers of each


@pytest.fixture(scope="module")
def verses():
    lines = (cla_export.demo_checkpoint() / "heldout.txt").read_text().splitlines()
    return [line.split() for line in lines if len(line.split()) > 10]


@pytest.fixture(scope="module")
def questions(verses):
    """The first half of a verse; its second half, among those of the verses after it."""
    halves = [(" ".join(v[: len(v) // 2]), " ".join(v[len(v) // 2 :])) for v in verses]
    return [
        {
            "question": halves[i][0],
            "choices": [halves[(i + k) % len(halves)][1] for k in range(WRONG + 1)],
            "gold": 0,
        }
        for i in range(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def found(client, server, bundle, questions, verses, tmp_path_factory):
    """lm-eval's results, and its samples by task."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [{"text": " ".join(verse)} for verse in verses[:QUESTIONS]]
    tasks = {
        "verses": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}],
        },
        "heldout": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, documents in (("verses", questions), ("heldout", texts)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        task = {"task": name, "test_split": "test", **source, **tasks[name]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    model = (
        f"model=demo,base_url={server.url}/v1/completions,tokenizer={bundle},num_concurrent=4,"
        "max_length=2048,tokenizer_backend=huggingface"
    )
    client(
        "lm_eval", "run", "--model", "local-completions", "--model_args", model,
        "--tasks", "verses,heldout", "--include_path", folder, "--output_path", folder / "out",
        "--log_samples",
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "hub"),
    )  # fmt: skip
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for name in tasks:
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        lines = map(json.loads, file.read_text().splitlines())
        samples[name] = sorted(lines, key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], samples


@pytest.fixture(scope="module")
def score():
    """The log-probability of `text` behind `context`, and whether greedy search would give it."""
    folder = cla_export.demo_checkpoint()
    executor = TorchExecutor(load_model(open_checkpoint(folder)), capacity=2048, slots=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = tokenizer.token_to_id("<bos>")

    def of(context, text):
        ids = tokenizer.encode(context + text, add_special_tokens=False).ids
        known = len(tokenizer.encode(context, add_special_tokens=False).ids)
        if not known:
            ids, known = [begin, *ids], 1
        logits = executor.prefill(0, ids, 0, keep=len(ids))[known - 1 : -1].astype(np.float64)
        log = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log -= logits.max(1, keepdims=True)
        wanted = ids[known:]
        return float(log[range(len(wanted)), wanted].sum()), log.argmax(1).tolist() == wanted

    return of


def test_multiple_choice_is_scored_as_pytorch_scores_it(found, questions, score):
    results, samples = found
    right = 0
    assert len(samples["verses"]) == QUESTIONS
    for question, sample in zip(questions, samples["verses"], strict=True):
        ours = [score(question["question"], " " + choice) for choice in question["choices"]]
        theirs = [response[0] for response in sample["resps"]]
        assert [float(value) for value, _ in theirs] == pytest.approx(
            [value for value, _ in ours], abs=2e-3
        )
        assert [str(greedy) == "True" for _, greedy in theirs] == [greedy for _, greedy in ours]
        right += int(np.argmax([value for value, _ in ours])) == question["gold"]
    assert results["verses"]["acc,none"] == pytest.approx(right / QUESTIONS)
    assert right / QUESTIONS > 1 / (WRONG + 1)  # the model knows more than chance


def test_perplexity_is_that_of_pytorch(found, verses, score):
    results, samples = found
    texts = [" ".join(verse) for verse in verses[:QUESTIONS]]
    ours = [score("", text)[0] for text in texts]
    theirs = [float(sample["resps"][0][0]) for sample in samples["heldout"]]
    assert theirs == pytest.approx(ours, abs=2e-3)
    words = sum(len(text.split()) for text in texts)
    perplexity = math.exp(-sum(ours) / words)
    assert results["heldout"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    bits = -sum(ours) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert results["heldout"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)

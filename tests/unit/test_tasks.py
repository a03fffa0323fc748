"""Tasks: questions that can be repeated, splits that never meet, rewards that cost at most themselves."""

import json
import math
import time

import pytest

from trueup.config import build_config
from trueup.errors import ConfigError, ModelError
from trueup.knobs import TaskConfig
from trueup.model.tiny import make_tiny
from trueup.monitor.rundir import RunFolder
from trueup.tasks.base import Question
from trueup.tasks.jsonl import Jsonl
from trueup.tasks.prompts import PromptSource, held_out
from trueup.tasks.reasoning import ReasoningGym, final_answer
from trueup.tasks.registry import make_task
from trueup.tasks.repeat import LETTERS, Repeat
from trueup.tasks.scoring import NotScored, ScoringPool


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tasks") / "tiny")


def test_repeat_scores_the_share_of_the_right_letter():
    task = Repeat()
    question = task.question(3)
    assert question == task.question(3) and question.text[-1] == question.answer and set(question.text) <= set(LETTERS)
    assert task.score("a", "aabb") == 0.5 and task.score("a", "") == 0.0 and task.score("a", "aaaa") == 1.0
    answers = [task.question(i).answer for i in range(4000)]
    for letter in LETTERS:  # what an answer that ignores the prompt earns
        blind = sum(task.score(answer, letter * 4) for answer in answers) / len(answers)
        assert blind == pytest.approx(Repeat.blind, abs=0.02)


def test_reasoning_gym_scores_with_its_own_scorer():
    task = make_task(TaskConfig(name="reasoning_gym/basic_arithmetic", settings={"max_terms": 2}))
    for index in (0, 7, 123_456):
        question = task.question(index)
        assert question == task.question(index)
        right = json.loads(question.answer)["answer"]
        assert task.score(question.answer, f"Let me see.\n{right}") == 1.0
        assert task.score(question.answer, f"<answer>{right}</answer> I think") == 1.0
        assert task.score(question.answer, "987654321") < 0.5 and task.score(question.answer, "") == 0.0


def test_every_task_of_reasoning_gym_survives_the_round_trip():
    """A question's answer, through JSON, still scores 1 (a sample of the tasks; tuples become lists on the way)."""
    import reasoning_gym

    names = sorted(reasoning_gym.factory.DATASETS)
    assert len(names) > 100
    for name in ("chain_sum", "gcd", "leg_counting", "spell_backward", "simple_equations", "base_conversion", "lcm",
                 "number_sorting", "word_sorting", "letter_counting", "decimal_arithmetic", "products"):  # fmt: skip
        task = ReasoningGym(name)
        question = task.question(5)
        assert task.score(question.answer, f"<answer>{json.loads(question.answer)['answer']}</answer>") == 1.0, name


def test_final_answer():
    assert final_answer("a\n\n b \n") == "b" and final_answer(" \n") is None
    assert final_answer("<answer>1</answer> no, <answer> 2 </answer>.") == "2"


@pytest.mark.parametrize(("scorer", "completion", "reward"), [
    ("exact", " 1/2\n", 1.0), ("exact", "1/2.", 0.0), ("contains", "It is 1/2.", 1.0), ("contains", "0.5", 0.0),
    ("math", "so it is $\\frac{1}{2}$", 1.0), ("math", "The answer is 0.5", 1.0), ("math", "2", 0.0), ("math", "", 0.0),
])  # fmt: skip
def test_jsonl_scorers(tmp_path, scorer, completion, reward):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Half?", "answer": "1/2"}\n\n{"prompt": "Two?", "answer": 2}\n')
    task = make_task(TaskConfig(name="jsonl", path=file, scorer=scorer))
    assert len(task) == 2 and task.question(1) == Question(text="Two?", answer="2")
    assert task.score("1/2", completion) == reward
    with pytest.raises(IndexError):
        task.question(2)


QUESTIONS = [{"prompt": f"add {i} and {i + 1}", "answer": 2 * i + 1} for i in range(40)]


def dumped(records, end="\n"):
    return end.join(json.dumps(r, ensure_ascii=False) for r in records) + end


@pytest.mark.parametrize(
    "content",
    [
        dumped(QUESTIONS).encode(),
        dumped([q | {"prompt": q["prompt"] + "\u2028Show your work."} for q in QUESTIONS]).encode(),
        b"\xef\xbb\xbf" + dumped(QUESTIONS).encode(),
        dumped(QUESTIONS, "\r\n").encode(),
    ],
    ids=["plain", "line separator inside", "byte-order mark", "Windows line ends"],
)
def test_data_sets_are_read_whatever_wrote_them(tmp_path, content):
    (tmp_path / "q.jsonl").write_bytes(content)
    task = Jsonl(tmp_path / "q.jsonl")
    questions = [task.question(i) for i in range(len(task))]
    assert len(task) == 40 and {q.answer for q in questions} == {str(2 * i + 1) for i in range(40)}
    assert all(q.text.startswith("add ") and "\r" not in q.text for q in questions)


def test_a_data_set_is_shuffled_by_its_seed_alone(tmp_path):
    (tmp_path / "q.jsonl").write_text(dumped(QUESTIONS))
    orders = [[q.text for q in Jsonl(tmp_path / "q.jsonl", seed=seed)._questions] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != [q["prompt"] for q in QUESTIONS]


def test_a_prompt_may_be_a_conversation(tiny, tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "2"},
    ]
    (tmp_path / "q.jsonl").write_text(dumped([{"prompt": turns, "answer": 4}]))
    task = Jsonl(tmp_path / "q.jsonl")
    source = PromptSource(task, tiny, chat=True)
    rendered = source.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert source.prompt(0).token_ids == tuple(source.tokenizer(rendered, add_special_tokens=False)["input_ids"])
    with pytest.raises(ConfigError, match=r"set task\.chat = true"):
        PromptSource(task, tiny, chat=False).prompt(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[{"prompt": "x"}]', "line 1 holds a JSON array"),
        ('{"question": "x", "answer": 1}', r"has no \"prompt\" \(it has answer, question\)"),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', "a message of a prompt is"),
        ('"x"', "not a JSON object"),
    ],
)
def test_a_line_that_is_no_question_says_what_it_is(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        Jsonl(tmp_path / "q.jsonl")


def test_a_run_notices_that_its_data_set_changed(tmp_path):
    run = RunFolder.create(tmp_path / "run", build_config({}), {})
    run.require_same_task("aa" * 32)
    run.close()
    again = RunFolder.resume(tmp_path / "run", build_config({}))
    with pytest.raises(ConfigError, match="the data set is not the one"):
        again.require_same_task("bb" * 32)
    again = RunFolder.resume(tmp_path / "run", build_config({}))
    again.require_same_task("aa" * 32)
    again.close()


def test_tasks_that_cannot_be_made_say_why(tmp_path):
    file = tmp_path / "q.jsonl"
    for content, text in (("", "no questions"), ('{"prompt": 3}', "line 1 has no"), ("{", "line 1 is not valid JSON")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=text):
            make_task(TaskConfig(name="jsonl", path=file))
    for config, text in (
        ({"name": "repaet"}, "did you mean 'repeat'"),
        ({"name": "jsonl"}, "needs task.path"),
        ({"name": "jsonl", "path": str(tmp_path / "absent")}, "cannot be read"),
        ({"name": "reasoning_gym/chain_sums"}, "did you mean 'chain_sum'"),
        ({"name": "reasoning_gym/chain_sum", "settings": {"terms": 3}}, "does not take these settings"),
    ):
        with pytest.raises(ConfigError, match=text):
            make_task(build_config({"task": config}).task)


def test_the_splits_never_meet_and_questions_can_be_repeated(tiny):
    source = PromptSource(Repeat(), tiny, chat=True)
    evaluation = source.held_out(50)
    assert len({p.token_ids for p in evaluation}) == 50 and all(held_out(p.token_ids) for p in evaluation)
    stream = source.training()
    training = [next(stream) for _ in range(2000)]
    assert not {p.token_ids for p in evaluation} & {p.token_ids for _, p in training}
    share = 2000 / (training[-1][0] + 1)
    assert 0.85 < share < 0.9  # one in eight is held out
    again = source.training(training[1000][0])
    assert next(again) == training[1000]
    assert source.decode(source.encode("abc")[-6:-3]) == "abc"[:3] or "abc" in source.decode(source.encode("abc"))


def test_a_file_begins_anew_and_a_split_may_be_empty(tiny, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"number {i}", "answer": "x"}) + "\n" for i in range(40)))
    source = PromptSource(make_task(TaskConfig(name="jsonl", path=file)), tiny, chat=False)
    stream = source.training()
    first = [next(stream)[1] for _ in range(100)]
    ids = [p.token_ids for p in first]
    assert len(set(ids)) < 40 and ids.count(ids[0]) >= 2
    assert len({p.prompt_id for p in first}) == 100  # each turn is told apart
    held = [f"number {i}" for i in range(40) if held_out(source.encode(f"number {i}"))]
    assert sorted(source.decode(p.token_ids) for p in source.held_out(99)) == sorted(held)
    only = next(text for text in map(str, range(99)) if not held_out(source.encode(text)))
    file.write_text(json.dumps({"prompt": only, "answer": "x"}))
    with pytest.raises(ConfigError, match="no held-out question"):
        PromptSource(make_task(TaskConfig(name="jsonl", path=file)), tiny, chat=False).held_out(1)


def test_a_tokenizer_that_does_not_fit(tiny, tmp_path):
    with pytest.raises(ModelError, match="no usable tokenizer"):
        PromptSource(Repeat(), tmp_path, chat=False)
    with pytest.raises(ModelError, match="elsewhere does not exist"):
        PromptSource(Repeat(), tmp_path / "elsewhere", chat=False)
    with pytest.raises(ConfigError, match=r"task\.system needs"):
        PromptSource(Repeat(), tiny, chat=False, system="Be brief.")
    with_system = PromptSource(Repeat(), tiny, chat=True, system="Be brief.").encode("abc")
    assert len(with_system) > len(PromptSource(Repeat(), tiny, chat=True).encode("abc"))


class Bad:
    """A scorer that does what its answer says."""

    name = "bad"

    def question(self, index):
        return Question(text="x", answer=None)

    def score(self, answer, completion):
        if answer == "raise":
            raise RuntimeError("no such unit")
        if answer == "hang":
            time.sleep(60)
        if answer == "die":
            import os

            os._exit(3)
        return {"nan": math.nan, "ok": 0.5}[answer]


def test_a_scorer_that_raises_hangs_or_dies_costs_its_completion_only():
    pool = ScoringPool(Bad(), workers=1, timeout_s=0.5)
    try:
        start = time.monotonic()
        found = pool.score([(a, "") for a in ("ok", "raise", "nan", "hang", "ok", "die", "ok")])
        assert time.monotonic() - start < 60
    finally:
        pool.close()
    assert [found[i] for i in (0, 4, 6)] == [0.5] * 3
    reasons = [found[i].reason for i in (1, 2, 3, 5)]
    assert all(isinstance(found[i], NotScored) for i in (1, 2, 3, 5))
    for reason, text in zip(reasons, ("no such unit", "reward is nan", "longer than 0.5 s", "ended"), strict=True):
        assert text in reason


def test_a_pool_is_shared_by_threads():
    from concurrent.futures import ThreadPoolExecutor

    pool = ScoringPool(Repeat(), workers=2, timeout_s=30)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda n: pool.score([("a", "a" * n + "b")])[0], range(1, 40)))
    finally:
        pool.close()
    assert found == pytest.approx([n / (n + 1) for n in range(1, 40)])

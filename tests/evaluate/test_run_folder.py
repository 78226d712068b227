"""A run folder stays with its study: another one is refused, the same one changed goes on."""

import json
from pathlib import Path

import pytest
import yaml

from candor.errors import UserError
from evaluate.cluster_submit import main as submit
from evaluate.experiment import main
from evaluate.run_folder import STUDY, claim_run
from evaluate.stages import Stage


def write(folder: Path, **change) -> str:
    """A study of a hosted model whose endpoint nobody serves, so that it runs up to sampling and stops."""
    endpoint = {"url": "http://127.0.0.1:1/v1", "retries": 0, "backoff_s": 0.01}
    values = {
        "name": "first",
        "title": "A title",
        "output": f"{folder}/run",
        "seed": 3,
        "bases": {},
        "domains": {},
        "hosted": {"far": {"size": "far", "api": {"model": "m", "endpoint": endpoint}}},
        "batteries": ["intentions"],
        "asks": [{"format": "choice", "mode": "sampled", "n": 1, "only": ["intentions/aligned/*1*"]}],
        "judge": "configs/evaluate/judges/nano.yaml",
        "workers": 1,
        **change,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A folder in which the study has begun to run."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(UserError, match="sample-far: "):
        main([write(tmp_path)])
    return tmp_path


def test_another_study_is_refused_and_the_same_one_goes_on(begun):
    run = begun / "run"
    assert json.loads((run / STUDY).read_text()) == {"name": "first", "variants": ["far"]}
    tables = {name: (run / name).read_bytes() for name in ("prompts.parquet", "variants.parquet", STUDY)}
    other = {"hosted": {"near": {"size": "far", "api": {"model": "m", "endpoint": {"url": "http://127.0.0.1:1/v1"}}}}}
    for change, message in (({"name": "second"}, "this one is called 'second'"), (other, "none of its variants .far.")):
        for dry in ([], ["--dry-run"]):
            with pytest.raises(UserError, match=f"holds the study 'first', and .*{message}.*output="):
                main([write(begun, **change), *dry])
    with pytest.raises(UserError, match="holds the study 'first'"):
        submit([write(begun, name="second"), "--profile", "example", "--dry-run"])
    assert tables == {name: (run / name).read_bytes() for name in tables}
    main([write(begun, title="Another title", draws=500, batteries=["intentions", "trivia"]), "--dry-run"])
    (run / STUDY).unlink()  # so it is renamed
    main([write(begun, name="second"), "--dry-run"])


def test_what_is_kept_follows_the_study(tmp_path):
    """Variants may come and go, as long as one stays; a damaged note is told."""
    stages = {
        name: Stage(id=name, module="serve.sample", config={"variant": name}, inputs=(), outputs=()) for name in "abc"
    }
    claim_run(tmp_path, "first", [stages["a"], stages["b"]])
    claim_run(tmp_path, "first", [stages["b"], stages["c"]])
    with pytest.raises(UserError, match="none of its variants"):
        claim_run(tmp_path, "first", [stages["a"]])
    (tmp_path / STUDY).write_text("{")
    with pytest.raises(UserError, match=r"study\.json cannot be read"):
        claim_run(tmp_path, "first", [stages["b"]])

"""The demo bundle, exported once per run, and a server over it."""

import fcntl
from pathlib import Path

import pytest

import cla_export

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ["system", "user", "assistant"] %}
{{ raise_exception("role " ~ message.role ~ " is not known") }}{% endif %}
{{ message.role }}: {{ message.content | trim }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    path = root / "served" / "demo"
    path.parent.mkdir(exist_ok=True)
    with (root / "served.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            cla_export.export(cla_export.demo_checkpoint(), path)
    return path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path

"""The server's page in a real browser: a prompt is answered, slots fill, nothing else is loaded."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from html import unescape

import httpx
import pytest
from fake import FakeExecutor
from running import application
from starlette.responses import Response

import cla_export
from cla_export.bundle import open_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.serve.page import FILES
from cla_export.tokenizer import load_tokenizer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Does what a person does, and writes down what is to be seen; the page itself is as shipped.
PERSON = """
const wait = ms => new Promise(done => setTimeout(done, ms));
const until = async what => { for (let i = 0; i < 600 && !what(); i++) await wait(50); };
(async () => {
  const text = id => document.getElementById(id).textContent;
  await until(() => document.querySelectorAll(".slot").length);
  document.getElementById("prompt").value = "And it came to pass";
  document.getElementById("n").value = 2;
  document.getElementById("max_tokens").value = 60;
  document.getElementById("go").click();
  const seen = { widest: 0, running: 0, used: "" };
  await until(() => {
    const bars = [...document.querySelectorAll(".slot .decoding")];
    seen.widest = Math.max(seen.widest, ...bars.map(bar => bar.getBoundingClientRect().width));
    if (Number(text("running")) > seen.running) {
      seen.running = Number(text("running"));
      seen.used = text("used");
    }
    return text("usage");
  });
  const root = document.documentElement;
  const layout = [...document.querySelectorAll("#layout tr")].map(
    row => [...row.cells].slice(1, -1).map(cell => cell.textContent).join(""));
  const found = {
    ...seen, layout, answers: [...document.querySelectorAll("#answers p")].map(p => p.textContent),
    usage: text("usage"), title: document.title, about: text("about"), saved: text("saved"),
    trouble: document.getElementById("trouble").hidden,
    slots: document.querySelectorAll(".slot").length,
    overflow: root.scrollWidth - root.clientWidth,
    from: performance.getEntriesByType("resource").map(e => e.name),
  };
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
  fetch("release");
})();
"""
HOLD = (
    '<script src="person.js"></script><img src="held.png" alt="" hidden>'  # loading lasts so long
)
FOLDER = cla_export.demo_checkpoint().parent / "serve"


@pytest.fixture
def page(demo_bundle):
    """The page's address, with a person in it; every step is slow enough to be seen."""
    bundle = open_bundle(demo_bundle, verify=False)
    executor = OnnxRuntimeExecutor(bundle, capacity=256, slots=4, threads=1)
    step = executor.decode

    def slowly(*arguments):
        time.sleep(0.03)
        return step(*arguments)

    executor.decode = slowly
    index = (FOLDER / "index.html").read_text().replace("</body>", HOLD + "</body>")
    done = asyncio.Event()

    async def release(_request):
        done.set()
        return Response()

    async def held(_request):
        await done.wait()
        done.clear()
        return Response(status_code=404)

    async def person(_request):
        return Response(index, media_type="text/html")

    async def script(_request):
        return Response(PERSON, media_type="text/javascript")

    routes = {"/person": person, "/person.js": script, "/held.png": held, "/release": release}
    tokenizer = load_tokenizer(cla_export.demo_checkpoint())
    with application(executor, demo_bundle, tokenizer=tokenizer, routes=routes) as (url, _):
        yield url


def open_in_browser(url, profile, *more):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, f"none of {', '.join(BROWSERS)} is installed"
    done = subprocess.run(
        [
            browser, "--headless", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--dump-dom", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={profile}", *more, url,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1280, 500])
def test_a_person_tries_a_prompt(page, tmp_path, width):
    dom, console = open_in_browser(
        f"{page}/person", tmp_path / "profile", f"--window-size={width},1000"
    )
    assert [line for line in console if "held.png" not in line] == []
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["title"] == "fake · cla-export"
    assert found["layout"] == [
        "01234567", "●○······", "··●○····", "····●○··", "······●○",
    ]  # fmt: skip
    assert len(found["answers"]) == 2
    assert all(a.startswith("And it came to pass") and len(a) > 60 for a in found["answers"])
    assert re.search(r"5 tokens of prompt, 0 of them cached; 120 new", found["usage"])
    assert found["running"] == 2
    assert found["widest"] > 10
    assert found["used"].endswith("KiB")
    assert found["slots"] == 4
    assert found["trouble"]
    assert found["overflow"] <= 0
    assert {name.removeprefix(page) for name in found["from"]} <= {
        "/page.js", "/page.css", "/person.js", "/status", "/v1/completions", "/held.png",
    }  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere_and_needs_no_key(tmp_path):
    with application(FakeExecutor(), tmp_path, keys=("sk",)) as (url, _):
        for path, (_, kind) in FILES.items():
            got = httpx.get(url + path)
            assert got.status_code == 200
            assert got.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in got.headers["content-security-policy"]
            words = got.text.replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in words
            assert "https:" not in words
        assert httpx.get(f"{url}/status").status_code == 401
        now = httpx.get(f"{url}/status", headers={"authorization": "Bearer sk"}).json()
        assert now["slots"] == [{"state": "free", "tokens": 0}] * 4
        assert now["kv_owner"] == [0, 0]

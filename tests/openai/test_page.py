"""The chat page in a real browser: what is seen, pressed and said, and stays harmless."""

import asyncio
import base64
import os
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, TOOLS_TEMPLATE, fetch

from ifp_mlx.engine import Done, Engine, OutOfMemory, Progress, Token
from ifp_mlx.openai import page as page_module
from ifp_mlx.openai.api import Policy, make_app
from ifp_mlx.openai.protocol import Defaults
from ifp_mlx.storage.folder import SHIPPED

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
pytest.importorskip("openai")

from served import write_able  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PICTURES = ROOT / "examples/guides/pictures"
QUIET = ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run")
QUIET += ("--disable-background-networking", "--disable-component-update")
WIDE, PHONE, ZOOMED = (1280, 860, 1), (360, 640, 3), (640, 400, 2)
GERMANY = "What is Germany called in French?"
NORWAY = "How do you say Norway in Polish?"
HOSTILE = (
    "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
    "[a](javascript:window.hacked=1) [b](<java\tscript:window.hacked=1>)"
    " <svg onload=window.hacked=1> [c](data:text/html,x) ![d](javascript:alert)"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def only_here(self, address):
        if address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError("tests have no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(scope="module")
def engine():
    with Engine.open(SHIPPED) as engine:
        engine.prepare(GERMANY, name="french")
        engine.prepare(NORWAY, name="polish")
        yield engine


class Saying:
    """An engine that says what it is given, and is another one in everything else."""

    def __init__(self, engine, *pieces, pause=0.0, error=None, tasks=None):
        self._engine, self._pieces, self._pause = engine, pieces, pause
        self._error, self.asked, self.stops = error, [], []
        if tasks is not None:
            self.tasks = lambda: tasks

    def __getattr__(self, name):
        return getattr(self._engine, name)

    async def astream(self, messages, *, stop, **options):
        self.asked.append((messages, options))
        self.stops.append(stop)
        if self._error:
            raise self._error
        try:
            yield Progress("decode", 0, 0)
            for number, piece in enumerate(self._pieces):
                await asyncio.sleep(self._pause)
                yield Token(piece, 0, number)
        finally:
            stop.cancel()  # as the engine does with who does not listen any more
        task = self._engine.task("french")
        kept = {"kept_channels": task.kept_channels, "total_channels": 1024}
        yield Done("stop", mask_id=task.mask_id, **kept)


@contextmanager
def served(engine, port=0, **policy):
    """Serve an engine, on a free port; yield the address."""
    app = make_app(engine, Policy(**{"name": "tiny"} | policy))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in QUIET:
        options.add_argument(argument)
    if os.getuid() == 0:  # whom Chromium's sandbox does not take
        options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        driver.get(f"{url}/")

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        return [node.text for node in self.all(selector)]

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, holds, what, seconds=20):
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, what
            time.sleep(0.05)
        return found

    def keys(self, *keys):
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self.driver, duration=0)
        for key in keys:
            chain.send_keys(getattr(Keys, key, key))
        chain.perform()

    def say(self, text):
        self["message"].send_keys(text)
        self.keys("ENTER")

    def idle(self, seconds=20):
        self.wait(lambda: self["send"].is_displayed(), "it never ends", seconds)

    def ask(self, text):
        """Ask and return the answer."""
        self.say(text)
        self.idle()
        return self.texts(".answer")[-1]

    def choose(self, source):
        [option] = [o for o in self.all("#source option") if o.text == source]
        option.click()

    def size(self, width, height, scale):
        how = {"width": width, "height": height, "deviceScaleFactor": scale}
        how["mobile"] = width < 500
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)

    def system(self, theme):
        how = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", how)

    def focused(self):
        return self.driver.switch_to.active_element.get_attribute("id")

    def colour(self):
        return self.run("return getComputedStyle(document.body).backgroundColor")

    def too_wide(self):
        """Return what sticks out of the page, except where one can scroll to it."""
        return self.run(
            """const wide = document.documentElement.clientWidth;
            const scrolls = (n) => n.closest("pre, .table, .hidden, .skip, header");
            return [...document.querySelectorAll("body *")].filter((node) =>
              node.getBoundingClientRect().right > wide + 0.5 && !scrolls(node)
            ).map((node) => node.outerHTML.slice(0, 99)).concat(
              document.scrollingElement.scrollWidth > wide ? ["the page"] : []);"""
        )


@pytest.fixture
def visit(browser):
    """Return what opens the page; at the end nothing may have been amiss in it."""
    opened = []

    def visit(url):
        opened.append(Page(browser, url))
        opened[-1].size(*WIDE)
        opened[-1].wait(lambda: opened[-1]["about"].text, "the server's state")
        return opened[-1]

    browser.get_log("browser")
    yield visit
    amiss = [
        line["message"]
        for line in browser.get_log("browser")
        if line["source"] != "network"  # where 401 and the like are told
    ]
    for page in opened:
        page.system("light")
    browser.get("about:blank")
    assert not amiss


def client(engine, **policy):
    app = make_app(engine, Policy(**{"name": "tiny"} | policy))
    return testclient.TestClient(app, base_url="http://127.0.0.1")


def test_the_page_needs_no_key_and_everything_it_asks_for_does(engine):
    with client(engine, api_key="secret") as http:
        for path, (_, kind) in page_module.FILES.items():
            answer = http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
        for path in ("/ifp/state", "/ifp/masks/x", "/v1/models", "/page.py"):
            assert http.get(path).status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert http.get("/ifp/state", headers=known).status_code == 200
        assert http.get("/", headers={"Host": "evil.example"}).status_code == 403
        assert http.post("/").status_code == 405


def test_the_page_may_ask_its_own_server_and_nobody_else(engine):
    with client(engine) as http:
        answers = [http.get(path) for path in page_module.FILES]
    for answer in answers:
        rules = dict(
            rule.split(" ", 1)
            for rule in answer.headers["content-security-policy"].split("; ")
        )
        assert rules.pop("default-src") == rules.pop("base-uri") == "'none'"
        assert rules.pop("form-action") == rules.pop("frame-ancestors") == "'none'"
        assert rules.pop("trusted-types") == "'none'"
        assert rules.pop("require-trusted-types-for") == "'script'"
        assert rules.pop("img-src") == "data:"
        assert {*rules} == {"script-src", "style-src", "connect-src"}
        assert {*rules.values()} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert {*re.findall(r"https?://[\w.]+", answer.text)} <= {"http://www.w3.org"}


def test_the_state_tells_the_tasks_and_a_mask_every_unit(engine):
    with client(engine) as http:
        state = http.get("/ifp/state").json()
        assert [task["name"] for task in state["tasks"]] == ["french", "polish"]
        [french, _] = state["tasks"]
        assert (french["instruction"], french["kept"]) == (GERMANY, 256)
        assert (state["layers"], state["units"], state["keep"]) == (2, 512, 0.25)
        assert state["memory"]["active"] > 0
        said = http.get(f"/ifp/masks/{french['mask_id']}").json()
        packed = np.frombuffer(base64.b64decode(said["bits"]), np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: 2 * 512].reshape(2, 512)
        assert (bits == (engine.mask("french") > 0)).all() and bits.sum() == 256
        lost = http.get("/ifp/masks/nothing")
    assert lost.status_code == 404 and "'nothing'" in lost.json()["error"]["message"]


def test_an_answers_mask_can_be_had_as_long_as_it_is_known(engine):
    ask = "Tell me the country number of Libya."
    *_, done = engine.stream(ask, max_tokens=1)
    assert (engine.mask(mask_id=done.mask_id) > 0).sum() == 256
    assert (engine.mask(mask_id=done.mask_id) != engine.mask("french")).any()


def test_a_conversation_shows_answers_figures_and_what_was_kept(engine, visit):
    with served(engine) as url:
        page = visit(url)
        assert page["model"].text == page.driver.title == "tiny"
        assert page["about"].text == "2 layers of 512 channels"
        assert page.ask(GERMANY) == "Allemagne"
        page.wait(lambda: "256 of 1024" in page["summary"].text, "the picture")
        assert "New since" not in page["summary"].text
        said = [("user", GERMANY), ("assistant", "Allemagne"), ("user", NORWAY)]
        messages = [{"role": role, "content": content} for role, content in said]
        assert page.ask(NORWAY) == engine.generate(messages).strip()
        assert page.texts(".asked") == [GERMANY, NORWAY]
        assert "25% kept" in page.texts(".figures")[0]
        figures = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
        assert figures["Kept"] == "25%" and "MB" in figures["Memory in all"]
        assert figures.keys() >= {"First token after", "Tokens per second"}
        assert page["map"].size["height"] > 20


def test_another_task_shows_what_is_new_and_what_is_gone(engine, visit):
    with served(engine) as url:
        page = visit(url)
        page.choose("french")
        assert page["task"].text == GERMANY and not page["share"].is_enabled()
        page.ask("What is Cuba called in French?")
        page.choose("polish")
        page.ask(NORWAY)
        page.wait(lambda: "New since" in page["summary"].text, "the difference")
        french, polish = (engine.mask(name) > 0 for name in ("french", "polish"))
        fresh, gone = (polish & ~french).sum(), (french & ~polish).sum()
        summary = page["summary"].text
        assert f"New since “french”: {fresh}; gone: {gone}." in summary
        assert summary in page["map"].get_attribute("aria-label")
        page.all("#picture summary")[0].click()
        rows = page.texts("#layers tbody tr")
        assert rows[1].split()[:2] == ["1", "128"] and len(rows) == 2
        total = sum(int(row.split()[3]) for row in rows)
        assert total == fresh > 0


def test_instruction_share_and_settings_are_asked_for_as_they_stand(engine, visit):
    saying = Saying(engine, "Yes.")
    with served(saying) as url:
        page = visit(url)
        page.choose("An instruction of my own")
        page["instruction"].send_keys("Be brief.")
        page["share"].send_keys("\ue012")  # the arrow to the left
        assert page["percent"].text == "20%"
        page["more"].click()
        page["longest"].send_keys("7")
        page["temperature"].send_keys("0.5")
        page.ask("One?")
        page["tell"].click()
        page.ask("Two?")
    (first, options), (second, _) = saying.asked
    said = [(message["role"], message["content"]) for message in first]
    assert said == [("system", "Be brief."), ("user", "One?")]
    said = [(message["role"], message["content"]) for message in second]
    assert said == [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    assert (options["instruction"], options["keep"]) == ("Be brief.", 0.2)
    assert (options["max_tokens"], options["temp"]) == (7, 0.5)


def test_an_error_is_said_in_the_servers_sentence_and_can_be_tried_again(engine, visit):
    with served(engine) as url:
        page = visit(url)
        page["more"].click()
        page["longest"].send_keys("100000")
        page.ask(GERMANY)
        [notice] = page.all(".notice")
        assert "more than the context of" in notice.text
        assert notice.get_attribute("role") == "alert"
        page["longest"].clear()
        [again] = page.all(".turn .buttons button")
        assert again.text == "Try again"
        again.click()
        page.wait(lambda: page.texts(".answer") == ["Allemagne"], "the answer")
        assert not page.all(".notice")


def test_an_error_in_the_midst_of_an_answer_is_said_and_what_was_said_stays(
    engine, visit
):
    class Failing(Saying):
        async def astream(self, messages, **options):
            yield Token("Half an", 0, 1)
            raise OutOfMemory("This needs more than there is.")

    with served(Failing(engine)) as url:
        page = visit(url)
        assert page.ask("Hello") == "Half an"
        assert page.texts(".notice") == ["This needs more than there is."]


def test_a_server_that_has_gone_is_said(engine, visit):
    with served(engine) as url:
        page = visit(url)
    page.ask("Hello")
    assert page.texts(".notice") == ["The server does not answer. Is it running?"]


def test_a_server_that_was_started_anew_is_asked_what_it_has(engine, visit):
    with served(engine, name="old") as url:
        page = visit(url)
    with served(Saying(engine, "Yes."), port=int(url.split(":")[-1]), name="new"):
        page.ask("Hello")
        assert "no model 'old'" in page.texts(".notice")[0]
        page.all(".turn .buttons button")[0].click()
        page.wait(lambda: page.texts(".answer") == ["Yes."], "the answer")
        assert page["model"].text == "new"


def test_stop_keeps_what_was_said_and_frees_the_server(engine, visit):
    saying = Saying(engine, *["word "] * 2000, pause=0.01)
    with served(saying) as url:
        page = visit(url)
        for way in (page["stop"].click, lambda: page.keys("ESCAPE")):
            page.say("Go on.")
            page.wait(lambda: "word" in page.texts(".answer")[-1], "a first word")
            assert not page["send"].is_displayed()
            way()
            page.idle()
            assert page.texts(".answer")[-1].startswith("word")
            stopped = saying.stops[-1]
            page.wait(lambda s=stopped: s.cancelled, "the server goes on")
        assert page["said"].text == "Stopped."
        page.all(".turn:last-child .buttons button")[-1].click()  # regenerate
        page.wait(lambda: len(saying.stops) == 3, "another try")
        page["fresh"].click()
        page.wait(lambda: not page.all(".turn"), "an empty page")
        assert page["welcome"].is_displayed() and saying.stops[-1].cancelled


def test_a_reload_keeps_conversation_settings_and_picture(engine, visit):
    with served(engine) as url:
        page = visit(url)
        page.choose("polish")
        page.ask(NORWAY)
        before = page.wait(lambda: page["summary"].text, "the picture")
        page["message"].send_keys("not sent yet")
        page.driver.refresh()
        page.wait(lambda: page["summary"].text == before, "the picture again")
        assert page.texts(".asked") == [NORWAY]
        assert page.texts(".answer") == ["Norwegia"]
        assert "kept" in page.texts(".figures")[0]
        assert page["source"].get_attribute("value") == "task:polish"
        page["fresh"].click()
        page.wait(lambda: not page.texts(".answer"), "a new conversation")
        assert page.ask(NORWAY) == "Norwegia" and page.texts(".asked") == [NORWAY]


def test_a_reload_in_the_midst_of_an_answer_keeps_what_there_was(engine, visit):
    saying = Saying(engine, *["word "] * 2000, pause=0.01)
    with served(saying) as url:
        page = visit(url)
        page.say("Go on.")
        page.wait(lambda: "word word" in page.texts(".answer")[-1], "some words")
        page.driver.refresh()
        page.wait(lambda: page.all(".turn .buttons"), "the turn")
        assert page.texts(".answer")[0].startswith("word word")
        assert not page.texts(".notice")
        assert "Stopped." in page.texts(".figures")
        page.wait(lambda: saying.stops[0].cancelled, "the server goes on")


def test_the_keyboard_is_enough(engine, visit):
    with served(engine) as url:
        page = visit(url)
        assert page.focused() == "message"
        page.keys("one", "TAB")
        assert page.focused() == "send"
        page.run("arguments[0].value = ''; arguments[0].focus()", page["message"])
        page.keys("a")
        from selenium.webdriver import ActionChains, Keys

        shift = ActionChains(page.driver, duration=0).key_down(Keys.SHIFT)
        shift.send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys("b").perform()
        assert page["message"].get_attribute("value") == "a\nb"
        assert not page.all(".turn")
        page.keys("BACKSPACE", "BACKSPACE", "BACKSPACE", NORWAY, "ENTER")
        page.idle()
        assert page.texts(".answer") == ["Norwegia"] and page.focused() == "message"
        page.run("document.activeElement.blur()")
        order = []
        while (name := (page.keys("TAB"), page.focused())[1]) not in order[:1]:
            order.append(name)
            assert len(order) < 40
        wanted = ["fresh", "theme", "log", "message", "send", "source", "share"]
        found = [name for name in order if name in wanted]
        first = found.index("fresh")
        assert [*found[first:], *found[:first]] == wanted
        assert page["said"].text == "Answered."


def test_everything_that_can_be_pressed_has_a_name(engine, visit):
    with served(engine) as url:
        page = visit(url)
        page.ask(NORWAY)
        controls = page.all("button, input, select, textarea, a, summary, canvas")
        named = [node for node in controls if node.is_displayed()]
        assert len(named) > 10
        for node in named:
            assert node.accessible_name.strip(), node.get_attribute("outerHTML")
        assert page["log"].aria_role == "log" and page["said"].aria_role == "status"
        assert page.run("return document.documentElement.lang") == "en"


LONG = "\n\n".join(
    [
        "Donaudampfschifffahrtsgesellschaft" * 9,
        "```python\n" + "x = " + " + ".join(["some_long_name"] * 30) + "\n```",
        "| a | " + "wide " * 40 + "|\n|---|---|\n| 1 | " + "2" * 120 + " |",
        "`" + "code" * 60 + "` https://example.org/" + "path/" * 60,
        "- " + "item" * 60 + "\n  - " + "deeper" * 60,
    ]
)


def test_nothing_sticks_out_however_long(engine, visit):
    with served(Saying(engine, LONG), name="m" * 99) as url:
        page = visit(url)
        page.ask("w" * 300)
        page.wait(lambda: "256 of" in page["summary"].text, "the picture")
        assert page["side"].is_displayed() and not page["panel"].is_displayed()
        assert not page.too_wide()
        for size in (PHONE, ZOOMED):
            page.size(*size)
            assert not page.too_wide()
            box = page["message"].rect
            assert box["y"] + box["height"] < size[1] and box["height"] >= 24
            assert not page["side"].is_displayed()
            page["panel"].click()
            assert page["side"].is_displayed() and not page["message"].is_displayed()
            assert page["map"].size["height"] > 20
            assert not page.too_wide()
            page.keys("ESCAPE")
            assert page["message"].is_displayed() and page.focused() == "panel"


def test_colours_follow_the_system_until_one_chooses(engine, visit):
    with served(engine) as url:
        page = visit(url)
        page.system("light")
        light = page.colour()
        page.system("dark")
        dark = page.colour()
        assert light != dark
        assert page["theme"].get_attribute("aria-pressed") == "true"
        page["theme"].click()
        assert page.colour() == light
        page.driver.refresh()
        page.wait(lambda: page.colour() == light, "the choice")
        page["theme"].click()
        page.system("light")
        assert page.colour() == dark


def test_thoughts_stand_apart_and_stay_text(engine, tmp_path, visit):
    marks = "<think>", "</think>"
    with Engine.open(
        write_able(tmp_path / "thinker", TOOLS_TEMPLATE, *marks)
    ) as thinker:
        saying = Saying(engine, "<think>", "Hm, ", "<b>hm</b>.", "</think>", "**Yes.**")
        saying.dialect = thinker.dialect
        with served(saying) as url:
            page = visit(url)
            assert page.ask("Hello") == "Yes."
            assert not page.all(".thoughts b")
            page.driver.refresh()
            page.wait(lambda: page.all(".turn .buttons"), "the turn")
            page.all(".thoughts summary")[0].click()
            assert page.texts(".thoughts p") == ["Hm, <b>hm</b>."]


MARKDOWN = """# Rivers & <b>hills</b> ##

The **Rhine** is *long*, `a < b` and ***both***; snake_case_name stays, 2 * 3 * 4 too.
See [the page](https://example.org/a_(b)?b=1&c=2 "t") or https://example.org/x_(y).

1. One
   - inner **bold**
   - other
2. Two

   more of two
> quoted
> text

| a | b |
|:--|--:|
| 1 | `2` |

```js
if (a < b) { "<i>" }

  // end
```
---
Unclosed **bold and `code"""


def test_markdown_is_drawn(engine, visit):
    with served(Saying(engine, *MARKDOWN)) as url:
        page = visit(url)
        page.ask("Hello")
        show = "return document.querySelector('.answer').innerHTML"
        html = page.run(show)
        texts = {
            "h3": ["Rivers & <b>hills</b>"],
            "strong": ["Rhine", "both", "bold"],
            "p a": ["the page", "https://example.org/x_(y)"],
            "ol > li > ul > li": ["inner bold", "other"],
            "ol > li > p": ["more of two"],
            "blockquote p": ["quoted\ntext"],
            "th": ["a", "b"],
            "td code": ["2"],
            "pre code": ['if (a < b) { "<i>" }\n\n  // end'],
            "figcaption span": ["js"],
            "hr": [""],
        }
        for selector, wanted in texts.items():
            assert page.texts(f".answer {selector}") == wanted, (selector, html)
        assert page.all(".answer em")[0].text == "long"
        last = page.texts(".answer > p")[-1]
        assert last == "Unclosed **bold and `code"
        assert "snake_case_name stays, 2 * 3 * 4 too." in page.texts(".answer")[0]
        [link, _] = page.all(".answer p a")
        assert link.get_attribute("href") == "https://example.org/a_(b)?b=1&c=2"
        assert link.get_attribute("rel") == "noopener noreferrer"
        whole = page.run(
            "sessionStorage.clear(); return document.querySelector('.answer').innerHTML"
        )
        page.driver.refresh()  # which draws all at once
        page.wait(lambda: page.all(".answer hr"), "the answer")
        assert page.run(show) == whole


def test_what_is_said_can_be_copied(engine, visit):
    with served(Saying(engine, MARKDOWN)) as url:
        page = visit(url)
        page.ask("Hello")
        [code, answer] = [b for b in page.all(".turn button") if b.text == "Copy"]
        for button, text in (
            (code, 'if (a < b) { "<i>" }\n\n  // end'),
            (answer, MARKDOWN),
        ):
            button.click()
            page.wait(lambda b=button: b.text == "Copied", "it copies")
            page["message"].clear()
            page["message"].send_keys("\ue009v")  # Ctrl-V
            assert page["message"].get_attribute("value") == text


def is_harmless(page):
    """Return whether nothing that was said has become a part of the page, or has run."""
    time.sleep(0.1)  # what would be loaded, or run, has been
    parts = "#log img, #log script, #log svg, #log a, aside img, aside script, h1 img"
    parts += ", [onerror], [onload], [href^=javascript], [src^=x]"
    return not page.all(parts) and page.run("return window.hacked") is None


def test_what_is_said_stays_text(engine, visit):
    typed = HOSTILE.replace("\t", "")
    [task] = [
        replace(engine.task("french"), name=HOSTILE, info={"instruction": HOSTILE})
    ]
    with served(Saying(engine, HOSTILE, tasks=[task]), name=HOSTILE) as url:
        page = visit(url)
        assert page["model"].text.startswith("<img src=x")
        page.choose("An instruction of my own")
        page["instruction"].send_keys(typed)
        assert "[a](javascript:window.hacked=1)" in page.ask(typed)
        assert page.texts(".asked") == [typed]
        page.wait(lambda: "for “<img src=x" in page["summary"].text, "the picture")
        page.all("#tasks option")[0].click()
        assert page["task"].text.startswith("<img src=x")
        assert is_harmless(page)
        page.driver.refresh()
        page.wait(lambda: page["task"].text.startswith("<img src=x"), "the task")
        assert "<script>window.hacked=1</script>" in page.texts(".answer")[0]
        assert is_harmless(page)


def test_an_error_stays_text(engine, visit):
    with served(Saying(engine, error=OutOfMemory(HOSTILE))) as url:
        page = visit(url)
        page.ask("Hello")
        assert page.texts(".notice")[0].startswith("<img src=x")
        assert is_harmless(page)


def test_the_key_is_asked_for_and_kept_in_the_tab_only(engine, browser, visit):
    with served(engine, api_key="open sesame") as url:
        page = Page(browser, url)
        page.size(*WIDE)
        page.wait(lambda: page["door"].is_displayed(), "the door")
        assert page.focused() == "api-key" and page["door-said"].text == ""
        page.keys("wrong", "ENTER")
        page.wait(lambda: "does not take" in page["door-said"].text, "a word")
        page.keys("open sesame", "ENTER")
        page.wait(lambda: page["about"].text, "the state")
        assert page.ask(NORWAY) == "Norwegia"
        page.wait(lambda: "256 of" in page["summary"].text, "the picture")
        held = page.run(
            "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        )
        assert ["open sesame" in one for one in held] == [True, False, False]
        page.driver.refresh()
        assert page.ask(NORWAY) == "Norwegia"
        page.run("sessionStorage.removeItem('ifp.key')")
        page.driver.refresh()
        page.wait(lambda: page["door"].is_displayed(), "the door again")
        page.keys("ESCAPE")
        page.wait(lambda: page["said"].text, "a word")
        assert page["said"].text == "The API key is missing or wrong."
        assert page.texts(".answer")[:1] == ["Norwegia"]
        browser.get_log("browser")


@pytest.mark.skipif(
    "IFP_MLX_PICTURES" not in os.environ,
    reason="draws the guide's pictures where IFP_MLX_PICTURES is set",
)
@pytest.mark.real
def test_the_guides_pictures(visit):
    def shoot(name):
        time.sleep(0.3)  # the last frame
        file = PICTURES / f"{name}.png"
        page.driver.save_screenshot(str(file))
        assert file.stat().st_size < 150_000

    with Engine.open(fetch("smollm2")) as engine:
        python = "You write short Python functions."
        engine.prepare(python, name="python", keep=0.75)
        with served(engine, name="smollm2", defaults=Defaults(keep=0.75)) as url:
            page = visit(url)
            page.choose("Write a story for children at bedtime.")
            page["more"].click()
            page["longest"].send_keys("1")  # the selection is what it is for
            page.say("A small dragon")
            page.idle(300)
            page["longest"].clear()
            page["more"].click()
            page["fresh"].click()
            page.choose("python")
            page.say("Write a function that adds two numbers.")
            page.idle(300)
            page.wait(lambda: "New since" in page["summary"].text, "the picture")
            page["message"].click()
            page.size(1280, 960, 1)
            shoot("page")
            page.size(360, 700, 1.5)
            page.system("dark")
            shoot("page-phone")

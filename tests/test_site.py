"""The built site: what entries of the interface say, and how pages look in a browser.

    make docs browser

`make test` skips this file: it builds no site and needs no browser.
"""

import base64
import contextlib
import dataclasses
import functools
import html
import http.server
import inspect
import json
import operator
import pathlib
import re
import runpy
import shutil
import threading

import numpy as np
import pytest

import diffprog as dp

from .test_style import public_names, ROOT


ENTRY = re.compile(
    r'<h\d id="(?P<name>diffprog[^"]*)"'
    r'|<div class="doc-signature highlight"><pre>(?P<signature>.*?)</pre>',
    re.DOTALL,
)
# What the solver alone calls, and nobody writes for himself.
INTERNAL = {"AugmentedLagrangian"}


@pytest.fixture(scope="module")
def site(request):
    path = request.config.getoption("--site")
    if path is None:
        pytest.skip("no built site: `make docs browser` builds and reads it")
    path = pathlib.Path(path).resolve()
    assert (path / "index.html").exists(), f"{path} has no site: run `make docs`"
    return path


@pytest.fixture(scope="module")
def entries(site):
    """By name, the signature of every entry of the interface."""
    found = {}
    for page in site.rglob("*.html"):
        name = None
        for match in ENTRY.finditer(page.read_text()):
            name = match["name"] or name
            text = html.unescape(re.sub("<[^>]*>", "", match["signature"] or ""))
            found[name] = found.get(name, "") + text
    return found


def public():
    return {name: operator.attrgetter(name)(dp) for name in public_names()}


def methods(cls):
    """The names of its methods and properties, but for those of other packages."""
    is_record = dataclasses.is_dataclass(cls)
    fields = {f.name for f in dataclasses.fields(cls)} if is_record else ()
    for name in dir(cls):
        item = inspect.getattr_static(cls, name)
        first = [base for base in cls.__mro__ if name in vars(base)][-1]
        if name in fields or (name.startswith("_") and name != "__call__"):
            continue
        if not first.__module__.startswith("diffprog"):
            continue
        if callable(item) or isinstance(item, property | staticmethod | classmethod):
            yield name, isinstance(item, property)


def told(name, families) -> bool:
    """Whether the list or the table of a class, or of its base, has the method."""
    docs = "".join(f"{c.__doc__} {c.__init__.__doc__}" for c in families)
    return f"`{name}`" in docs or f"`{name}(" in docs


def test_every_public_function_has_a_signature(entries):
    functions = [name for name, item in public().items() if inspect.isroutine(item)]
    assert len(functions) > 60
    unsigned = lambda name: (
        not entries.get(f"diffprog.{name}", "").startswith(name.split(".")[-1] + "(")
    )
    assert [name for name in functions if unsigned(name)] == []


def test_every_public_method_has_a_signature(entries):
    classes = {name: c for name, c in public().items() if inspect.isclass(c)}
    checked, missing = 0, []
    for name, cls in classes.items():
        families = {n: c for n, c in classes.items() if c in cls.__mro__}
        for method, is_property in methods(cls):
            start = method + ("" if is_property else "(")
            signed = (entries.get(f"diffprog.{n}.{method}", "") for n in families)
            checked += 1
            if name not in INTERNAL and not told(method, families.values()):
                if not any(text.startswith(start) for text in signed):
                    missing.append(f"{name}.{method}")
    assert checked > 400
    assert missing == []


BROWSERS = "chromium", "chromium-browser", "google-chrome"
WIDTHS = 1280, 390


@pytest.fixture(scope="module")
def browser(site):
    reason = "no playwright: `make browser` installs it"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: on Debian, `apt-get install chromium`")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


@pytest.fixture(scope="module")
def root(site, request):
    """The address of the site: that of a server, or of its folder."""
    if request.param == "file":
        yield site.as_uri()
        return
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def tab(browser, root, **options):
    """A page, and what goes wrong on it: messages, what is missing, what is foreign."""
    context = browser.new_context(reduced_motion="reduce", **options)
    page, faults = context.new_page(), []
    page.set_default_timeout(180_000)  # another program may have the processor

    def route(route):
        url = route.request.url
        if url.startswith((root, "data:", "blob:")):
            route.continue_()
        else:
            faults.append(f"asks for {url}")
            route.abort()

    def told(message):
        if message.type in ("error", "warning"):
            faults.append(f"says {message.text}")

    def answered(response):
        if response.status >= 400:
            faults.append(f"misses {response.url}")

    page.route("**/*", route)
    page.on("console", told)
    page.on("pageerror", lambda error: faults.append(f"fails: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"misses {request.url}"))
    page.on("response", answered)
    yield page, faults
    context.close()


# In the language of the browser: lists of what is wrong on a page.
SIZES = """() => {
  const faults = [], screen = document.documentElement;
  const content = document.querySelector(".md-content__inner");
  const text = (e) => (e.textContent || e.alt || "").trim().slice(0, 60);
  const beyond = screen.scrollWidth - screen.clientWidth;
  if (beyond > 0) faults.push(`the page is ${beyond} pixels too wide`);
  const scrolls = (e) =>
    e !== content &&
    (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  // Code and tables reach into the margins of a narrow page, one em.
  const edge = content.getBoundingClientRect().right + 17;
  for (const e of content.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > edge && !scrolls(e.parentElement))
      faults.push(`${e.tagName} is too wide: ${text(e)}`);
  }
  for (const e of content.querySelectorAll("math")) {
    const box = e.getBoundingClientRect();
    if (e.checkVisibility() && (box.width < 2 || box.height < 5))
      faults.push(`a formula has no size: ${text(e)}`);
  }
  for (const e of content.querySelectorAll(".formula *")) {
    const box = e.getBoundingClientRect();
    const room = e.closest(".formula").getBoundingClientRect();
    if (box.height && (box.bottom > room.bottom + 1 || box.top < room.top - 1))
      faults.push(`a formula is cut: ${text(e)}`);
  }
  for (const e of document.images)
    if (!e.complete || !e.naturalWidth) faults.push(`no picture ${e.src}`);
  return faults;
}"""

COLORS = """(scheme) => {
  document.body.setAttribute("data-md-color-scheme", scheme);
  const faults = new Set(), known = new Map();
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) =>
    [a * r + (1 - a) * R, a * g + (1 - a) * G, a * b + (1 - a) * B, 1];
  const behind = (e) => {
    if (!e) return [255, 255, 255, 1];
    const color = parse(getComputedStyle(e).backgroundColor);
    return color[3] === 1 ? color : over(color, behind(e.parentElement));
  };
  const linear = (c) =>
    c <= 10.3 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) =>
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (known.has(e) || !walk.currentNode.data.trim()) continue;
    known.set(e, true);
    if (/^(script|style|noscript)$/i.test(e.tagName)) continue;
    const seen = { opacityProperty: true, visibilityProperty: true };
    if (!e.checkVisibility(seen)) continue;
    const style = getComputedStyle(e), back = behind(e);
    const [a, b] = [luminance(over(parse(style.color), back)), luminance(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), bold = style.fontWeight >= 700;
    if (ratio < (size >= 24 || (bold && size >= 18.6) ? 3 : 4.5))
      faults.add(`${ratio.toFixed(1)}: ${e.tagName}.${e.className} ${style.color}`);
  }
  for (const e of document.querySelectorAll(".md-content__inner img")) {
    const style = getComputedStyle(e);
    const dark = scheme === "slate" && parseFloat(style.borderRadius) === 0;
    if (parse(style.backgroundColor).join() !== "255,255,255,1" || dark)
      faults.add(`a picture without a plate: ${e.src}`);
  }
  return [...faults];
}"""
STILL = "*, ::before, ::after { transition: none !important; }"


def pages(site):
    found = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert len(found) > 60
    return found


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_every_page_is_whole_and_readable(browser, site, root):
    faults = {}
    with tab(browser, root, viewport={"width": 1280, "height": 900}) as (page, wrong):
        for name in pages(site):
            if name == "404.html":  # its addresses begin at the root of a server
                continue
            page.goto(f"{root}/{name}")
            page.add_style_tag(content=STILL)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                faults[name, width] = page.evaluate(SIZES)
            for scheme in ("default", "slate"):
                faults[name, scheme] = page.evaluate(COLORS, scheme)
            page.set_viewport_size({"width": 1280, "height": 900})
            faults[name, "load"] = wrong[:]
            wrong.clear()
    assert {where: found for where, found in faults.items() if found} == {}


@pytest.mark.parametrize("root", ["http"], indirect=True)
def test_every_page_loads_from_a_server(browser, site, root):
    faults = {}
    with tab(browser, root) as (page, wrong):
        for name in pages(site):
            page.goto(f"{root}/{name}")
            faults[name] = wrong[:]
            wrong.clear()
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize("root", ["file", "http"], indirect=True)
@pytest.mark.parametrize("start", ["index.html", "api/lqr.html"])
def test_the_search_finds_target_propagation(browser, root, start):
    with tab(browser, root) as (page, wrong):
        page.goto(f"{root}/{start}")
        page.locator(".md-search__input").press_sequentially("target propagation")
        first = page.locator(".md-search-result__link").first
        assert "oracles/target_propagation.html" in first.get_attribute("href")
        first.click()
        page.wait_for_url("**/oracles/target_propagation.html*")
        assert page.locator("h1").inner_text().startswith("Target propagation")
    assert wrong == []


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_a_page_follows_the_colors_of_the_system_and_a_choice(browser, root):
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    with tab(browser, root, color_scheme="dark") as (page, wrong):
        page.goto(f"{root}/index.html")
        assert page.evaluate(scheme) == "slate"
        page.locator("label[title='Light colors']").click()
        assert page.evaluate(scheme) == "default"
    assert wrong == []


@pytest.fixture(scope="module")
def plans():
    """The problems of the page that moves, and the plans that were written for it."""
    docs = ROOT / "docs"
    program = runpy.run_path(str(docs / "programs" / "play.py"))
    data = json.loads((docs / "play-data.js").read_text()[len("const PLAY = ") : -2])
    unpacked = lambda text: np.frombuffer(base64.b64decode(text), "<f4").astype(float)
    pendulum, car = data["pendulum"], data["car"]
    us = unpacked(pendulum["plans"]).reshape(13, 7, 60, 3)[..., :1]
    controls = unpacked(car["plans"]).reshape(10, 9, 50, 2)
    at = lambda i, j: np.array([pendulum["angles"][i], pendulum["velocities"][j]])
    drive = lambda i, j: program["Drive"](np.array([car["xs"][i], car["ys"][j]]))
    return {
        "pendulum": lambda i, j: dp.rollout(program["pendulum"](), at(i, j), us[i, j]),
        "car": lambda i, j: dp.rollout(
            dp.ControlProblem.from_system(drive(i, j), 50),
            np.array(car["start"]),
            controls[i, j],
        ),
        "costs": {name: unpacked(data[name]["costs"]) for name in data},
    }


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize("cell", [(0, 0), (6, 3), (9, 5)])
@pytest.mark.parametrize("system", ["pendulum", "car"])
def test_the_page_that_moves_rolls_out_as_the_library_does(
    browser, root, plans, system, cell
):
    with tab(browser, root) as (page, wrong):
        page.goto(f"{root}/play.html")
        drawn = page.evaluate(f"play.{system}.stored({cell[0]}, {cell[1]})")
    ours = plans[system](*cell)
    np.testing.assert_allclose(drawn["xs"], ours.xs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(drawn["cost"], ours.cost, rtol=1e-9, atol=1e-9)
    columns = {"pendulum": 7, "car": 9}[system]
    stored = plans["costs"][system][cell[0] * columns + cell[1]]
    np.testing.assert_allclose(drawn["cost"], stored, rtol=1e-3, atol=1e-3)
    assert wrong == []


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize("width", WIDTHS)
def test_dragging_changes_what_is_drawn(browser, root, width):
    size = {"width": width, "height": 900}
    with tab(browser, root, viewport=size) as (page, wrong):
        page.goto(f"{root}/play.html")
        for board, told in (
            ("play-plane", "play-swing-cost"),
            ("play-swing", "play-swing-cost"),
            ("play-road", "play-road-cost"),
        ):
            canvas, words = page.locator(f"#{board}"), page.locator(f"#{told}")
            canvas.scroll_into_view_if_needed()
            picture, text = canvas.evaluate("e => e.toDataURL()"), words.inner_text()
            box = canvas.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.down()
            x, y = box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"]
            page.mouse.move(x, y, steps=3)
            page.mouse.up()
            assert canvas.evaluate("e => e.toDataURL()") != picture
            dragged = words.inner_text()
            assert dragged != text
            canvas.press("ArrowLeft")
            assert words.inner_text() != dragged
        assert page.evaluate("play.state.swing.xs.length") == 61
    assert wrong == []

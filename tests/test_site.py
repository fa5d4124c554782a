"""The built site: what entries of the interface say, and how pages look in a browser.

    make docs browser

`make test` skips this file: it builds no site and needs no browser.
"""

import contextlib
import dataclasses
import functools
import html
import http.server
import inspect
import operator
import pathlib
import re
import shutil
import threading

import pytest

import diffprog as dp

from .test_style import public_names


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
WIDTHS = 1280, 844, 390, 320  # a phone also on its side, and a small one


@pytest.fixture(scope="module")
def browser(site):
    reason = "no playwright: `make browser` installs it"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: on Debian, `apt-get install chromium`")
    with playwright.sync_playwright() as p:
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        args = ["--no-sandbox", alone]
        chromium = p.chromium.launch(executable_path=path, args=args)
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

    def asked(request):
        if not request.url.startswith((root, "data:", "blob:")):
            faults.append(f"asks for {request.url}")

    def told(message):
        if message.type in ("error", "warning"):
            faults.append(f"says {message.text}")

    def answered(response):
        if response.status >= 400:
            faults.append(f"misses {response.url}")

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # else the next page came first
            faults.append(f"misses {request.url}")

    page.on("request", asked)
    page.on("console", told)
    page.on("pageerror", lambda error: faults.append(f"fails: {error}"))
    page.on("requestfailed", failed)
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
# On paper nothing scrolls.
CUT = """() => {
  const scrolls = "pre > code, .formula, .md-typeset__scrollwrap";
  return [...document.querySelectorAll(scrolls)]
    .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .map((e) => `${e.className} is cut: ${e.textContent.trim().slice(0, 60)}`);
}"""
SEARCHES = {
    "target propagation": "oracles/target_propagation",
    "warm start": "how-to/warm-starts",
    "DARE": "concepts/lqr",
    "batch normalization": "oracles/frameworks",
    "TrainState": "oracles/frameworks",
}
OPEN = "document.querySelectorAll('details').forEach((e) => (e.open = true))"
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
            page.evaluate(OPEN)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                faults[name, width] = page.evaluate(SIZES)
            page.set_viewport_size({"width": 718, "height": 900})  # A4
            page.emulate_media(media="print")
            faults[name, "print"] = page.evaluate(CUT)
            page.emulate_media(media="screen")
            for scheme in ("default", "slate"):
                faults[name, scheme] = page.evaluate(COLORS, scheme)
            page.set_viewport_size({"width": 1280, "height": 900})
            faults[name, "load"] = wrong[:]
            wrong.clear()
    assert {where: found for where, found in faults.items() if found} == {}


@pytest.mark.parametrize("root", ["http"], indirect=True)
def test_pages_of_every_folder_load_from_a_server(browser, site, root):
    faults = {}
    folders = {pathlib.Path(name).parent: name for name in pages(site)}
    with tab(browser, root) as (page, wrong):
        for name in ("404.html", *folders.values()):
            page.goto(f"{root}/{name}")
            faults[name] = wrong[:]
            wrong.clear()
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize("root", ["file", "http"], indirect=True)
@pytest.mark.parametrize("start", ["index.html", "api/lqr.html"])
def test_the_search_finds_pages(browser, root, start):
    expect = pytest.importorskip("playwright.sync_api").expect
    with tab(browser, root) as (page, wrong):
        page.goto(f"{root}/{start}")
        first = page.locator(".md-search-result__link").first
        for words, answer in SEARCHES.items():
            page.locator(".md-search__input").fill("")
            page.locator(".md-search__input").press_sequentially(words)
            address = re.compile(rf"(^|/){answer}\.html")
            expect(first).to_have_attribute("href", address, timeout=60_000)
        first.click()
        page.wait_for_url(f"**/{[*SEARCHES.values()][-1]}.html*")
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

"""The page that moves: what it rolls out, and how the mouse and a finger move it."""

import base64
import json
import runpy

import numpy as np
import pytest

import diffprog as dp

from .test_site import browser, root, site, tab
from .test_style import ROOT


__all__ = ["browser", "root", "site"]  # fixtures


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
@pytest.mark.parametrize("width", [1280, 390])
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


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize("size", [(390, 844), (844, 390)])
def test_a_finger_drags_the_point_and_scrolls_beside_it(browser, root, size):
    size = {"width": size[0], "height": size[1]}
    touch = {"has_touch": True, "is_mobile": True}
    with tab(browser, root, viewport=size, **touch) as (page, wrong):
        session = page.context.new_cdp_session(page)

        def send(kind, *points):
            points = [{"x": x, "y": y} for x, y in points]
            event = {"type": f"touch{kind}", "touchPoints": points}
            session.send("Input.dispatchTouchEvent", event)

        told = lambda: page.locator(".play-cost").all_inner_texts()

        def swipe(x, y, right, up):
            """How far the page went, and whether the words changed."""
            at, words = page.evaluate("scrollY"), told()
            send("Start", (x, y))
            for part in range(1, 9):
                send("Move", (x + right * part / 8, y - up * part / 8))
                page.wait_for_timeout(20)
            send("End")
            page.wait_for_timeout(100)
            return page.evaluate("scrollY") - at, told() != words

        for board, (a, b), aside in (
            ("play-plane", (0.5, 0.5), 0.1),
            ("play-swing", (0.5, 0.885), 0.1),
            ("play-road", (0.486, 0.4375), 0.9),
        ):
            page.goto(f"{root}/play.html")
            canvas = page.locator(f"#{board}")
            center = "e => e.scrollIntoView({block: 'center', behavior: 'instant'})"
            canvas.evaluate(center)
            box = canvas.bounding_box()
            x, y = box["x"] + a * box["width"], box["y"] + b * box["height"]
            assert swipe(x, y, 30, 20) == (0, True)
            away = box["x"] + aside * box["width"], box["y"] + box["height"] / 2
            far, changed = swipe(*away, 0, -80)
            assert far < -40
            assert not changed
            canvas.evaluate(center)
            words = told()
            page.touchscreen.tap(*away)
            assert told() != words
    assert wrong == []

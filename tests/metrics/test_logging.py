"""Log lines, readable and as JSON."""

import io
import json
import logging

import pytest

from powerband.metrics.logging import set_up_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("powerband").setLevel(logging.NOTSET)


def test_json_lines_carry_the_extra_fields():
    stream = io.StringIO()
    set_up_logging(format="json", stream=stream)
    logging.getLogger("powerband.engine").info("step %d done", 3, extra={"seconds": 0.5})
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"], line["message"], line["seconds"]) == (
        "info",
        "powerband.engine",
        "step 3 done",
        0.5,
    )


def test_text_lines_name_level_and_room_without_colour_off_a_terminal():
    stream = io.StringIO()
    set_up_logging(stream=stream)
    logging.getLogger("powerband.server").warning("slow")
    assert stream.getvalue().split(" ", 1)[1] == "WARNING server: slow\n"


def test_the_level_holds_and_setting_up_twice_does_not_repeat_lines():
    stream = io.StringIO()
    set_up_logging("warning", stream=stream)
    set_up_logging("warning", stream=stream)
    logging.getLogger("powerband.server").info("hidden")
    logging.getLogger("powerband.server").error("shown")
    assert stream.getvalue().count("shown") == 1
    assert "hidden" not in stream.getvalue()


def test_an_exception_is_one_json_line():
    stream = io.StringIO()
    set_up_logging(format="json", stream=stream)
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("powerband.engine").exception("failed")
    assert "RuntimeError: boom" in json.loads(stream.getvalue())["exception"]

"""The page, in a real browser without a window."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the extra `app` is not installed")
webdriver = pytest.importorskip("selenium.webdriver")

from conftest import ROOT
from describe import TINY
from draw_scene import draw_scene
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="Chromium and its driver are not installed"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,760"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A Space as `push_to_hub.py --space` makes it, for step3-tiny on this machine."""
    from push_to_hub import SPACE

    directory = tmp_path_factory.mktemp("space")
    (directory / "app.py").write_text(SPACE["app.py"].format(repo_id=TINY, name="space"))
    shutil.copy(ROOT / "scripts" / "app.py", directory / "page.py")
    return directory


@pytest.mark.parametrize("kind", ["step3 app", "space"])
def test_the_page_answers_about_a_scene(kind, browser, space, tmp_path):
    line = [sys.executable, ROOT / "scripts" / "app.py", TINY] if kind == "step3 app" else [sys.executable, "app.py"]
    environment = {"env": None} if kind == "step3 app" else {"cwd": space}
    log = tmp_path / "log.txt"
    process = subprocess.Popen(line, stdout=log.open("w"), stderr=subprocess.STDOUT, **environment)
    wait = WebDriverWait(browser, 300)
    try:
        wait.until(lambda _: "http://" in log.read_text() or process.poll() is not None)
        url = log.read_text().partition("http://")[2].split()[0]
        browser.get(f"http://{url}")
        sizes = []
        for number, shape in enumerate(("wide", "square")):
            scene, path = draw_scene(7 + number, shape), tmp_path / f"{shape}.png"
            scene.image.save(path)
            text, answer = scene.questions["describe"]
            field = wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0]
            browser.execute_script("arguments[0].value = ''", field)  # or Selenium sends the last file once more
            field.send_keys(str(path))
            wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".thumbnails img, .thumbnail-item img"))
            browser.find_element(By.CSS_SELECTOR, "textarea").send_keys(text, Keys.ENTER)
            sizes.append("{} x {} pixels".format(*scene.image.size))
            shown = [*sizes, "1 x 3 patches, 29 tokens"] + [answer] * (number == 0)
            wait.until(
                lambda _, shown=shown: all(text in browser.find_element(By.TAG_NAME, "body").text for text in shown)
            )
        assert browser.find_element(By.TAG_NAME, "body").text.count("(1 picture)") == 2
    finally:
        process.terminate()
        process.wait()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert sent and all(url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome:")) for url in sent), sent

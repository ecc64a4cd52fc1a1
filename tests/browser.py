"""Headless Chromium (Debian's chromium and chromium-driver), and a page in it."""

import shutil

import numpy as np
import pytest


def start_chromium():
    """A driver; skips the test where there is no browser."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.chrome.service.Service(driver)
    return selenium.Chrome(options=options, service=service)


class Tab:
    """A page in a browser: what a user does, and what the canvases then show."""

    def __init__(self, driver, path):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.driver, self.keys = driver, Keys
        self.actions = lambda: ActionChains(driver, duration=0)
        self.screen(1280, 1000)
        driver.get(path.as_uri())
        self.wait("document.body.dataset.ready === 'yes'")

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 10).until(lambda d: d.execute_script(f"return {condition}"))

    def screen(self, width, height, mobile=False, scheme="light"):
        """Size of the window, and whether the user prefers dark."""
        metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def word(self, position):
        return self.all(f"button[data-position='{position}']")[0]

    def press(self, *keys):
        self.actions().send_keys(*keys).perform()

    def away(self):
        self.actions().move_to_element(self.all("#settings")[0]).perform()

    def canvas(self, view, index):
        """Pixels of the picture (0), the overlay (1) or the veil (2) of a figure: (h, w, 4)."""
        script = """
            const canvas = document.querySelectorAll(`#${arguments[0]} canvas`)[arguments[1]];
            const { width, height } = canvas;
            const copy = new OffscreenCanvas(width, height);
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const pixels = context.getImageData(0, 0, width, height).data;
            return [height, width, Array.from(pixels)];"""
        height, width, pixels = self.driver.execute_script(script, view, index)
        return np.array(pixels, np.uint8).reshape(height, width, 4)

    def lit(self, view):
        """Which patches of a figure the veil leaves free, or None if there is no veil."""
        alpha = self.canvas(view, 2)[..., 3]
        return None if (alpha == 0).all() else (alpha == 0).tolist()

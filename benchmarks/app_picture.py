"""A picture of the page of `svdd app`, in Chromium without a window. Writes docs/images/app.png."""

import argparse
import base64
import io
import shutil
import time
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.support.wait import WebDriverWait

from benchmarks.app_memory import Server

FILLED = {
    "prompt textarea": "fox on a purple background",
    "sampler input": "SMC",
    "budget input": "200",
    "images input": "2",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/app.png"))
    parser.add_argument("--width", type=int, default=1280)
    given = parser.parse_args(arguments)
    server, options = Server(), webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        metrics = {"width": given.width, "height": 900, "deviceScaleFactor": 1, "mobile": given.width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(server.url)
        waiting = WebDriverWait(driver, 120)
        waiting.until(lambda _: driver.find_elements("css selector", "#draw"))
        for name, text in FILLED.items():
            field = driver.find_element("css selector", f"#{name}")
            field.click()
            field.send_keys(Keys.CONTROL + "a")
            field.send_keys(text + Keys.ENTER)
        waiting.until(lambda _: driver.find_elements("css selector", "#sampler-SMC"))
        driver.find_element("css selector", "#draw").click()
        waiting.until(lambda _: "Done" in driver.find_element("css selector", "#status").text)
        time.sleep(1)  # until all of it is painted
        print(driver.find_element("css selector", "#status").text)
        for name in ("rewards", "cost"):
            print(driver.find_element("css selector", f"#{name}").text)
        height = driver.execute_script("return document.querySelector('#plot').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": given.width, "height": height + 60, "scale": 0.75}
        shot: Any = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as picture:
            picture.convert("RGB").quantize(256).save(given.output, optimize=True)
    finally:
        driver.quit()
        server.close()


if __name__ == "__main__":
    main()

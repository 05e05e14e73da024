"""The screens among the reference pictures: a web page in its window, and a terminal."""

import numpy as np
from drawing import GREY, INK, font, monospaced
from PIL import Image, ImageDraw

SIZE = (1024, 640)


def desktop() -> Image.Image:
    """A web page in its window: tabs, a bar at the side, cards with small graphs, a list."""
    screen = Image.new("RGB", SIZE, "#f3f5f9")
    pen, random = ImageDraw.Draw(screen), np.random.default_rng(6)
    pen.rectangle((0, 0, 1024, 34), "#d7dce5")
    for number, colour in enumerate(("#e2574c", "#e9b53c", "#55b85a")):
        pen.ellipse((14 + 22 * number, 11, 26 + 22 * number, 23), colour)
    pen.rounded_rectangle((90, 6, 290, 44), 8, "white")
    pen.text((104, 13), "Garden club - overview", INK, font(13))
    pen.rectangle((0, 34, 1024, 68), "white")
    pen.rounded_rectangle((90, 40, 900, 62), 11, "#eef0f4")
    pen.text((106, 44), "club.example/overview", GREY, font(13))
    pen.rectangle((0, 68, 200, 640), "#24324a")
    for number, name in enumerate(("Overview", "Members", "Beds", "Calendar", "Messages", "Tools", "Settings")):
        y = 92 + 44 * number
        if number == 0:
            pen.rounded_rectangle((10, y - 8, 190, y + 28), 6, "#3c5584")
        pen.rounded_rectangle((24, y + 2, 40, y + 18), 4, "#9fb2d6")
        pen.text((54, y + 1), name, "white", font(15))
    pen.text((226, 90), "Good morning, Ines", INK, font(26))
    for x, name, fill, ink in ((800, "New bed", "#2f7d4f", "white"), (908, "Export", "white", INK)):
        pen.rounded_rectangle((x, 88, x + 96, 120), 6, fill, "#b8c0cc")
        pen.text((x + 48, 104), name, ink, font(14), anchor="mm")
    cards = (("Members", "148", "#3973c6"), ("Beds in use", "61 of 72", "#2f7d4f"), ("Hours spent", "93.5", "#c0722b"))
    for number, (name, value, colour) in enumerate(cards):
        x = 226 + 262 * number
        pen.rounded_rectangle((x, 142, x + 246, 282), 8, "white", "#d5dae2")
        pen.text((x + 16, 154), name, GREY, font(14))
        pen.text((x + 16, 176), value, INK, font(28))
        walk = np.cumsum(random.normal(0, 6, 28))
        heights = 264 - 40 * (walk - walk.min()) / np.ptp(walk)
        pen.line([(x + 16 + 8 * i, height) for i, height in enumerate(heights.tolist())], colour, 2)
    pen.rounded_rectangle((226, 300, 996, 620), 8, "white", "#d5dae2")
    pen.text((242, 314), "Coming up", INK, font(18))
    tasks = (
        ("Water the seedlings", "Ben", "Today", "#c0722b"),
        ("Mend the fence by the pond", "Ruth, Amir", "Today", "#c0722b"),
        ("Order compost", "Ines", "Thursday", "#3973c6"),
        ("Plan the summer market", "Everyone", "Saturday", "#3973c6"),
        ("Sharpen spades and shears", "Otto", "Sunday", "#3973c6"),
        ("Count the bulbs", "Ruth", "Done", "#2f7d4f"),
    )
    for number, (task, who, when, colour) in enumerate(tasks):
        y = 348 + 44 * number
        pen.line((242, y, 980, y), "#e4e8ee")
        pen.rectangle((244, y + 14, 260, y + 30), "white", "#8a94a3")
        pen.text((276, y + 14), task, INK, font(15))
        pen.text((620, y + 14), who, GREY, font(15))
        pen.rounded_rectangle((860, y + 9, 970, y + 35), 13, colour)
        pen.text((915, y + 22), when, "white", font(13), anchor="mm")
    return screen


def terminal() -> Image.Image:
    """The log of a server, in light letters on dark."""
    screen = Image.new("RGB", SIZE, "#14171c")
    pen, mono, random = ImageDraw.Draw(screen), monospaced(14), np.random.default_rng(11)
    levels = {"INFO": "#6ec27a", "WARN": "#e0b04a", "ERROR": "#e0605a"}
    saying = (
        ("INFO", "GET /catalogue/{a} 200 in {b} ms"),
        ("INFO", "POST /pictures 201 in {b} ms, {a} kB, 3 sizes written"),
        ("INFO", "worker {c}: queue holds {b} jobs, oldest waits {c} s"),
        ("WARN", "picture {a}: no date in its header, the file's is taken"),
        ("INFO", "GET /search?word=harbour 200 in {b} ms, {c} results of {a}"),
        ("ERROR", "picture {a}: the file ends after {b} blocks; skipped"),
    )
    pen.text((12, 10), "ines@attic:~/archive$ ./serve --port 8080 --workers 4 | tee today.log", "#d8dee6", mono)
    second = 0
    for number in range(33):
        level, text = saying[int(random.choice(len(saying), p=(0.3, 0.2, 0.2, 0.1, 0.15, 0.05)))]
        second += int(random.integers(1, 9))
        a, b, c = random.integers((100, 8, 1), (9999, 180, 9))
        y = 29 + 18 * number
        pen.text((12, y), f"07:{41 + second // 60:02}:{second % 60:02}", "#7d8794", mono)
        pen.text((97, y), level, levels[level], mono)
        pen.text((156, y), text.format(a=a, b=b, c=c), "#d8dee6", mono)
    pen.rectangle((12, 624, 20, 638), "#d8dee6")
    return screen

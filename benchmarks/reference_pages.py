"""Pages and screens among the reference pictures: words of our own, in Pillow's font and one of matplotlib's."""

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAGE, SCREEN = (700, 990), (1024, 640)
INK, GREY = "#202020", "#707070"

ARTICLE = [
    "A vision-language model reads an image as a row of tokens. The image is cut into patches, a tower of attention "
    "layers turns each patch into a vector, and a projector hands the vectors to the language model, which treats them "
    "much like words. A photograph of a clear sky and a page of small print become equally many tokens.",
    "This is convenient, and wasteful. Patches of sky say the same thing hundreds of times, yet each of them takes a "
    "place in the cache, is attended to by every later token, and is paid for in time until the answer ends. A page of "
    "print, on the other hand, may need all the places it can get: a word that was thrown away cannot be read.",
    "So the number of tokens should follow the picture. Instead of asking how many tokens an image may keep, we ask "
    "how much of it must be kept, and let each image find the number that this takes.",
    "2 Measuring what is there",
    "Put the vectors of all tokens below each other and call the matrix X. Its singular values say how the content is "
    "spread over directions. If few directions hold nearly all the energy, then the rows are much alike, and few rows "
    "can stand for the others. If the energy is spread out, they are not.",
    "Let the budget be the least number of directions whose energy reaches a share of the whole. A wall reaches it "
    "after a handful, a street after some dozens, a table of figures after hundreds. One threshold thus gives many "
    "budgets, and no classifier has to be trained to guess what kind of picture it was shown.",
    "The decomposition is cheap beside the tower. Only singular values are needed, not vectors, and those of a small "
    "square matrix will do: the product of the features with themselves has as many rows as the shorter side.",
    "3 Choosing the tokens",
    "A budget is a number and not yet a choice. We keep tokens that attention looks at, or tokens that lie far from "
    "one another, so that what was kept still covers the picture. Each keeps the position it had before, because the "
    "language model has learnt to read places from positions.",
    "What is dropped is gone for the whole of a conversation. Somebody who first asks for the colour of a car may ask "
    "for its number plate next. Whoever sets the threshold should therefore think of the hardest question, not of the "
    "first one, and should measure on pictures of their own.",
    "4 What it saves",
    "Prompts become shorter, so that the first word of an answer comes sooner. Caches hold more conversations, so that "
    "fewer have to wait. How much that is depends on the pictures: screens and walls shrink to a tenth, dense pages "
    "stay nearly whole. The mean over a day of traffic is what an operator plans with, and it moves when that does.",
    "A fixed budget has the opposite nature. Its cost is known beforehand, its loss is not. We think that costs are "
    "easier to watch than losses, since every dashboard shows the one and hardly any the other.",
    "5 Limits",
    "Energy is not meaning. A small sign in a wide landscape adds little to the spectrum and may be all that matters. "
    "Noise adds much and matters never. Neither can be mended by a better threshold alone: whoever cares for small "
    "signs keeps a least number of tokens for every picture, and whoever has noisy cameras keeps a greatest.",
    "Last, a spectrum is that of one tower. Thresholds do not carry over from one model to another, and have to be "
    "found again, on the same pictures, when the model is changed.",
]
CAPTION = "Figure 1. Energy over the number of directions: of a wall, of a street, of a page of print (sketches)."
LETTER = [
    "Dear Ms Okafor,",
    "Thank you for the box of photographs, which arrived safely on Tuesday. We have sorted them into four albums: the "
    "harbour, the workshop, the family, and those of which nobody here could say where they were taken.",
    "Our reading room will scan all of them in the course of the winter. As you asked, the backs are scanned as well, "
    "because the dates and names on them are often the only ones there are. A program proposes a short description for "
    "each picture, and one of us corrects it by hand before it goes into the catalogue.",
    "You wanted to know how many pictures we can describe in a day. Plain ones take the program a moment, crowded ones "
    "a little longer; it gives each as much attention as there is to see. Most of the time is still ours.",
    "The originals will be sent back to you by the end of March. If you would rather fetch them yourself, please ring "
    "the bell at the side door on any weekday between nine and four.",
    "With kind regards,",
]
GOODS = [
    ("Drawing paper, 50 sheets", 6, 1180),
    ("Pencils, soft, box of 12", 4, 935),
    ("Ink, black, 30 ml", 10, 420),
    ("Ruler, steel, 50 cm", 2, 1490),
    ("Folders, grey", 40, 65),
    ("Labels, white, 500", 3, 799),
    ("Envelopes, C5, 100", 5, 1240),
    ("Paper clips, 1000", 2, 310),
    ("Desk lamp", 1, 4950),
    ("Sealing tape, 6 rolls", 3, 1125),
]
SHOPPING = [
    ("Rye bread", 1, 385),
    ("Milk 1 l", 2, 129),
    ("Apples, kg", 3, 240),
    ("Butter", 1, 279),
    ("Coffee 500 g", 1, 799),
    ("Tomatoes, kg", 2, 315),
    ("Pasta", 4, 99),
    ("Olive oil", 1, 890),
    ("Soap", 2, 165),
    ("Newspaper", 1, 320),
]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


def monospaced(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's, laid out as Pillow's own, whatever libraries Pillow was built with."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The lines of a paragraph that is ``width`` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def columns() -> Image.Image:
    """A page of an article, in two columns of small print."""
    page = Image.new("RGB", PAGE, "white")
    pen, width, step = ImageDraw.Draw(page), 298, 16
    pen.text((350, 48), "How many tokens is a picture worth?", INK, font(26), anchor="mt")
    pen.text((350, 86), "Notes on budgets that follow the image", GREY, font(15), anchor="mt")
    lines = [("1 Introduction", True), ("", False)]
    for text in ARTICLE:
        lines += [(line, text[0].isdigit()) for line in wrapped(text, 13, width)] + [("", False)]
    left, top, bottom = 42, 124, 936
    x, y = left, top
    for line, heading in lines:
        if y > bottom - step * (1 + 2 * heading):
            x, y = x + width + 20, top
        if line or y > top:
            pen.text((x, y), line, INK, font(15 if heading else 13))
            y += step if line else step // 2
    y = figure(pen, (x, y + 10, x + width, bottom - 42))
    for number, line in enumerate(wrapped(CAPTION, 12, width)):
        pen.text((x, y + 8 + 15 * number), line, GREY, font(12))
    pen.text((350, 962), "17", GREY, font(13), anchor="mm")
    return page


def figure(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int]) -> int:
    """Three curves within that box; returns where it ends."""
    left, top, right, bottom = box
    for share in (0.25, 0.5, 0.75):
        pen.line((left, bottom - share * (bottom - top), right, bottom - share * (bottom - top)), "#dddddd")
    for half, dark in ((12, "#202020"), (50, "#606060"), (120, "#a0a0a0")):
        curve = [(left + x, bottom - (bottom - top) * x / (x + half)) for x in range(right - left)]
        pen.line(curve, dark, 2)
    pen.rectangle(box, outline=INK)
    return bottom


def letter() -> Image.Image:
    page = Image.new("RGB", PAGE, "#fffdf7")
    pen = ImageDraw.Draw(page)
    pen.text((90, 70), "Harbour Town Archive", "#244a73", font(28))
    pen.line((90, 110, 610, 110), "#244a73", 2)
    pen.text((90, 120), "14 Quay Street, third floor", GREY, font(14))
    pen.text((610, 180), "9 November", INK, font(16), anchor="ra")
    y = 235
    for text in LETTER:
        for line in wrapped(text, 17, 520):
            pen.text((90, y), line, INK, font(17))
            y += 24
        y += 16
    turn = np.linspace(0, 9 * np.pi, 220)
    x, rise = 104 + 5 * turn + 11 * np.sin(turn), 30 - 13 * np.cos(turn) * np.exp(-turn / 25) + 5 * np.sin(turn / 3.7)
    strokes = np.column_stack((x, y + rise)).tolist()
    pen.line([(across, down) for across, down in strokes], "#1b2f7a", 2, joint="curve")
    pen.text((90, y + 62), "J. Lindqvist, keeper of photographs", INK, font(17))
    return page


def invoice() -> Image.Image:
    page = Image.new("RGB", PAGE, "white")
    pen = ImageDraw.Draw(page)
    pen.rectangle((0, 0, 700, 26), "#2f6f5e")
    pen.text((50, 60), "Alder & Finch", "#2f6f5e", font(32))
    pen.text((50, 102), "Paper and office goods", GREY, font(15))
    pen.text((650, 60), "INVOICE", INK, font(32), anchor="ra")
    for number, line in enumerate(("No. 20417", "Date 3 May", "Due 2 June", "Customer 881")):
        pen.text((650, 106 + 20 * number), line, INK, font(15), anchor="ra")
    for number, line in enumerate(("To", "Hill School", "Room 12", "5 Orchard Lane")):
        pen.text((50, 146 + 20 * number), line, INK if number else GREY, font(15))
    edges, top, high = (50, 340, 420, 530, 650), 260, 40
    pen.rectangle((50, top, 650, top + high), "#dcebe5")
    rows = [("Item", "Number", "Price", "Amount")]
    rows += [(name, str(count), money(price), money(count * price)) for name, count, price in GOODS]
    for number, row in enumerate(rows):
        middle = top + high * number + high // 2
        pen.text((edges[0] + 10, middle), row[0], INK, font(15), anchor="lm")
        for cell, edge in zip(row[1:], edges[2:], strict=True):
            pen.text((edge - 10, middle), cell, INK, font(15), anchor="rm")
        pen.line((50, middle + high // 2, 650, middle + high // 2), GREY)
    bottom = top + high * len(rows)
    pen.rectangle((50, top, 650, bottom), outline=INK, width=2)
    for edge in edges[1:-1]:
        pen.line((edge, top, edge, bottom), GREY)
    total = sum(count * price for _, count, price in GOODS)
    tax = round(total * 0.2)
    for number, (name, cents) in enumerate((("Sum", total), ("Tax 20 %", tax), ("To pay", total + tax))):
        size = 20 if name == "To pay" else 15
        pen.text((520, bottom + 30 + 30 * number), name, INK, font(size), anchor="rm")
        pen.text((640, bottom + 30 + 30 * number), money(cents), INK, font(size), anchor="rm")
    pen.text((50, 900), "Please state the number of this invoice with your payment.", GREY, font(14))
    pen.text((50, 922), "Goods remain ours until they are paid for.", GREY, font(14))
    return page


def receipt() -> Image.Image:
    """A strip of paper on a table, photographed a little askew."""
    paper = Image.new("RGB", (400, 860), "#f6f4ee")
    pen = ImageDraw.Draw(paper)
    pen.text((200, 40), "CORNER MARKET", INK, monospaced(30), anchor="mt")
    pen.text((200, 82), "8 Mill Road  Open 7 to 22", INK, monospaced(17), anchor="mt")
    lines = ["-" * 32, *(f"{f'{n} x {name}':<24}{money(n * price):>8}" for name, n, price in SHOPPING), "-" * 32]
    total = sum(count * price for _, count, price in SHOPPING)
    lines += [f"{'TOTAL':<24}{money(total):>8}", f"{'CASH':<24}{money(6000):>8}"]
    lines += [f"{'CHANGE':<24}{money(6000 - total):>8}", "", "Till 3            14:52", "Receipt 000731"]
    for number, line in enumerate(lines):
        pen.text((30, 125 + 28 * number), line, INK, monospaced(17))
    for x, wide in enumerate(np.random.default_rng(3).integers(1, 5, 60)):
        pen.rectangle((80 + 4 * x, 700, 79 + 4 * x + int(wide), 770), INK)
    pen.text((200, 800), "THANK YOU", INK, monospaced(20), anchor="mt")
    random = np.random.default_rng(4)
    grain = np.cumsum(random.normal(0, 2.5, (990, 1)), 0) % 24 - 12 + random.normal(0, 3, (990, 520))
    table = np.clip(np.array([126, 92, 66]) + grain[..., None], 0, 255).astype(np.uint8)
    picture = Image.fromarray(table)
    askew = partial(Image.Image.rotate, angle=2.5, expand=True, resample=Image.Resampling.BICUBIC)
    turned, mask = askew(paper), askew(Image.new("L", paper.size, 255))
    picture.paste(turned, ((520 - turned.width) // 2, (990 - turned.height) // 2), mask)
    return noisy(np.asarray(picture, dtype=np.float64), 3, 5)


def desktop() -> Image.Image:
    """A web page in its window: tabs, a bar at the side, cards with small graphs, a list."""
    screen = Image.new("RGB", SCREEN, "#f3f5f9")
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
    screen = Image.new("RGB", SCREEN, "#14171c")
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


def noisy(pixels: NDArray[np.float64], strength: float, seed: int) -> Image.Image:
    """With the noise of a sensor on ``[height, width, 3]``."""
    noise = np.random.default_rng(seed).normal(0, strength, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))

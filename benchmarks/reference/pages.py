"""The pages among the reference pictures: an article, a letter, an invoice and a receipt, with words of our own."""

from functools import partial
from pathlib import Path

import numpy as np
from drawing import GREY, INK, font, monospaced, noisy
from PIL import Image, ImageDraw

PAGE = (700, 990)
CAPTION = "Figure 1. Energy over the number of directions: of a wall, of a street, of a page of print (sketches)."
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


def paragraphs(name: str) -> list[str]:
    """Of a file beside this one: they are separated by empty lines."""
    return Path(__file__).with_name(name).read_text().split("\n\n")


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
    for text in paragraphs("article.txt"):
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
    for text in paragraphs("letter.txt"):
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

"""Writes ``lighthouse.txt``, the training text of ``train_deepseek_style_lm.py``: a lighthouse keeper's log.

The sentences are original and are put together by a seeded generator, so the file can be made again byte for byte:
``python examples/make_text.py``.
"""

import random
from pathlib import Path

WINDS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
MOODS = ["cold and steady", "light at first, then strong", "hardly enough to move a flag", "wet and full of salt"]
MOODS += ["sharp as a file", "soft, with a smell of rain", "in gusts that shook the door", "calm by evening"]
SHIPS = ["Marigold", "Patience", "Morning-Star", "Heron", "Juniper", "Good-Hope", "Swallow", "Clementine", "Rosamund"]
KINDS = ["schooner", "brig", "fishing boat", "coal barge", "mail steamer", "pilot cutter", "two-masted ketch"]
CARGO = ["salt", "timber", "oranges", "roof slates", "barrels of oil", "letters and newspapers", "wool", "lime"]
WHEN = ["at dawn", "before breakfast", "at noon", "in the early afternoon", "an hour after sunset", "near midnight"]
BIRDS = ["gulls", "terns", "cormorants", "a grey heron", "two puffins", "a lost pigeon", "starlings"]
CHORES = [
    "I trimmed the lamp and filled it with oil.",
    "I polished the brass of the great lens until I saw my face in it.",
    "I painted the rail on the windward side.",
    "I wound the clock and set it by the tide table.",
    "I carried water up the stairs, all one hundred and twelve of them.",
    "I mended the net that hangs by the door.",
    "I swept the sand out of the kitchen, and the wind swept it in again.",
    "I oiled the hinges of the gallery door.",
    "I wrote down the height of the water at the stone.",
    "I counted the stores: flour for six weeks, tea for one.",
]
THOUGHTS = [
    "The light turns, and I turn with it.",
    "A quiet day is a good day for those who are at sea.",
    "It is strange how loud the sea is when nobody speaks.",
    "I thought of my brother, who never learned to swim.",
    "When the fog came I rang the bell, once every minute, and nobody answered.",
    "There is no hurry here, only the next turn of the lamp.",
    "I slept in the chair and woke when the rain began.",
    "The cat caught a mouse and would not show it to me.",
    "Somebody out there saw the light tonight and knew the way.",
    "I read the same page three times and then went up to look at the sky.",
]
FOG = ["Fog until {hour}, so thick that the rocks were gone.", "No fog today, and I could see as far as the islands."]
HOURS = ["noon", "the evening", "midnight"]
FOG += ["A bank of fog stood in the west all day and did not come nearer."]
REPLIES = [
    "All well here.",
    "Send oil and candles.",
    "The channel is clear.",
    "Keep to the east of the rocks.",
    "Thank you.",
]


def entry(day: int, r: random.Random) -> str:
    wind, other = r.sample(WINDS, 2)
    when, when2 = r.sample(WHEN, 2)
    ship, kind, cargo = r.choice(SHIPS), r.choice(KINDS), r.choice(CARGO)
    passing = [
        f"The {kind} {ship} passed {when} with a cargo of {cargo}.",
        f"{when[0].upper() + when[1:]} I saw the {ship}, a {kind}, going {other} under full sail.",
        f"The {kind} {ship} anchored in the bay {when} and waited for the tide.",
        f'The {ship} signalled {when}: "What water in the channel?" I answered: "{r.choice(REPLIES)}"',
        f"No ship {when}. {r.choice(BIRDS).capitalize()} on the rocks, and nothing else all day.",
    ]
    lines = [
        f"Wind from the {wind}, {r.choice(MOODS)}.",
        r.choice(passing),
        r.choice(CHORES),
        f"Saw {r.choice(BIRDS)} {when2}.",
        r.choice(FOG).format(hour=r.choice(HOURS)),
        r.choice(THOUGHTS),
    ]
    middle = r.sample(lines[1:5], r.choice([2, 3, 4]))
    return f"Day {day}. " + " ".join([lines[0], *middle, lines[5]])


def text(days: int = 300, seed: int = 11) -> str:
    r = random.Random(seed)
    return "\n\n".join(entry(day, r) for day in range(1, days + 1)) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("lighthouse.txt")
    path.write_text(text())
    print(f"{path}: {path.stat().st_size} bytes")

#!/usr/bin/env python3
"""Text for the tiny demonstration model. Every sentence is made here, from lists and templates.

The domain is narrow on purpose: a model of three million weights can know a few hundred facts well
or many badly. A prompt whose digest falls in the held-out twentieth never reaches training, so
evaluation asks questions the model has not seen word for word.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from facts import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLOURS,
    DAYS,
    DEFINITIONS,
    FOREIGN,
    FRUITS,
    IDENTITY,
    KINDS,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    SMALL_TALK,
    SYMBOLS,
    WORDS,
)


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function of one argument, as offered to the model."""

    name: str
    description: str
    argument: str
    meaning: str

    def schema(self) -> dict[str, object]:
        """The OpenAI form, which the chat template prints."""
        properties = {self.argument: {"type": "string", "description": self.meaning}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    def call(self, value: str) -> str:
        call = {"name": self.name, "arguments": {self.argument: value}}
        return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation, or a plain text when `text` is set. `expect` is what a right answer contains."""

    topic: str
    turns: tuple[Turn, ...] = ()
    tools: tuple[Tool, ...] = ()
    text: str = ""
    expect: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Exchange:
    topic: str
    question: str
    answer: str
    expect: tuple[str, ...]


def is_held_out(prompt: str) -> bool:
    """True for one prompt in twenty, the same ones on every machine and for every seed."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 13


def is_unseen_pair(a: int, b: int) -> bool:
    """Sums that no training text contains, in any wording or order."""
    low, high = sorted((a, b))
    return (7 * low + 3 * high) % 17 == 5


def politely(rng: random.Random, made: Exchange) -> str:
    """Vary the surroundings of a question, so that the held-out fraction has something to vary."""
    question = made.question
    if made.topic in ("repeat", "remember", "country"):
        return question  # begins with words to copy, which must keep their form
    shape = rng.random()
    if shape < 0.55:
        return question
    lowered = question[0].lower() + question[1:]
    if shape < 0.65:
        return f"Please tell me: {lowered}"
    if shape < 0.75:
        return f"Hello! {question}"
    if shape < 0.82:
        return f"I have a question. {question}"
    if shape < 0.88:
        return lowered
    if shape < 0.94:
        return question.rstrip("?.")
    return f"{question} Thank you."


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def joined(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


# --- questions with one right answer -------------------------------------------------------


def addition(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    total = a + b
    question = rng.choice(
        [
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"Add {a} and {b}.",
            f"{a} + {b} = ?",
            f"What is {a}+{b}?",
            f"How much is {a} plus {b}?",
        ]
    )
    return Exchange("addition", question, f"{a} + {b} = {total}.", (f"= {total}.",))


def subtraction(rng: random.Random) -> Exchange:
    a = rng.randint(0, 20)
    b = rng.randint(0, a)
    question = rng.choice(
        [
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"Subtract {b} from {a}.",
            f"{a} - {b} = ?",
            f"How much is {a} minus {b}?",
        ]
    )
    return Exchange("subtraction", question, f"{a} - {b} = {a - b}.", (f"= {a - b}.",))


def multiplication(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    question = rng.choice(
        [
            f"What is {a} x {b}?",
            f"What is {a} times {b}?",
            f"Multiply {a} by {b}.",
            f"{a} x {b} = ?",
            f"How much is {a} times {b}?",
        ]
    )
    return Exchange("multiplication", question, f"{a} x {b} = {a * b}.", (f"= {a * b}.",))


def capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.7:
        question = rng.choice(
            [
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Name the capital of {country}.",
                f"Do you know the capital of {country}?",
                f"Tell me the capital city of {country}.",
            ]
        )
        return Exchange("capital", question, f"The capital of {country} is {city}.", (city,))
    question = rng.choice(
        [
            f"{city} is the capital of which country?",
            f"Which country has {city} as its capital?",
            f"Of which country is {city} the capital?",
        ]
    )
    return Exchange("country", question, f"{city} is the capital of {country}.", (country,))


def colour(rng: random.Random) -> Exchange:
    thing, shade = rng.choice(COLOURS)
    question = rng.choice(
        [
            f"What colour is {thing}?",
            f"Which colour does {thing} have?",
            f"Tell me the colour of {thing}.",
            f"What is the colour of {thing}?",
        ]
    )
    return Exchange("colour", question, f"{thing[0].upper()}{thing[1:]} is {shade}.", (f"is {shade}",))


def animal(rng: random.Random) -> Exchange:
    name, sound, legs, home, young = rng.choice(ANIMALS)
    one = with_article(name)
    kind = rng.randrange(4)
    if kind == 0:
        question = rng.choice(
            [f"What does {one} say?", f"What sound does {one} make?", f"Which sound does {one} make?"]
        )
        return Exchange("animal", question, f"{one.capitalize()} says {sound}.", (sound,))
    if kind == 1:
        question = rng.choice(
            [f"How many legs does {one} have?", f"Tell me how many legs {one} has.", f"Count the legs of {one}."]
        )
        return Exchange(
            "animal", question, f"{one.capitalize()} has {NUMBER_WORDS[legs]} legs.", (f"{NUMBER_WORDS[legs]} legs",)
        )
    if kind == 2:
        question = rng.choice(
            [f"Where does {one} live?", f"What is the home of {one}?", f"In which place does {one} live?"]
        )
        return Exchange("animal", question, f"{one.capitalize()} lives {home}.", (home,))
    question = rng.choice(
        [f"What is a young {name} called?", f"What do we call a baby {name}?", f"What is the name for a young {name}?"]
    )
    return Exchange("animal", question, f"A young {name} is called {with_article(young)}.", (f" {young}.",))


def opposite(rng: random.Random) -> Exchange:
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    question = rng.choice(
        [
            f"What is the opposite of {word}?",
            f"Give the opposite of {word}.",
            f"Which word is the opposite of {word}?",
            f"What means the opposite of {word}?",
        ]
    )
    return Exchange("opposite", question, f"The opposite of {word} is {other}.", (f"is {other}.",))


def calendar(rng: random.Random) -> Exchange:
    cycle, unit = (DAYS, "day") if rng.random() < 0.6 else (MONTHS, "month")
    at = rng.randrange(len(cycle))
    step, relation = rng.choice([(1, "after"), (-1, "before")])
    answer = cycle[(at + step) % len(cycle)]
    verb = "comes" if rng.random() < 0.6 else "is"
    question = rng.choice(
        [
            f"Which {unit} {verb} {relation} {cycle[at]}?",
            f"What {unit} {verb} {relation} {cycle[at]}?",
            f"Name the {unit} {relation} {cycle[at]}.",
            f"Tell me the {unit} {relation} {cycle[at]}.",
        ]
    )
    return Exchange("calendar", question, f"The {unit} {relation} {cycle[at]} is {answer}.", (f"is {answer}.",))


def kind_of(rng: random.Random) -> Exchange:
    kind, members = rng.choice(KINDS)
    member = rng.choice(members)
    one = with_article(member)
    question = rng.choice(
        [
            f"What kind of thing is {one}?",
            f"Is {one} a fruit, a tool, an animal, a vehicle or an instrument?",
            f"Which kind does {one} belong to?",
        ]
    )
    return Exchange("kind", question, f"{one.capitalize()} is {with_article(kind)}.", (f"{with_article(kind)}.",))


def definition(rng: random.Random) -> Exchange:
    term, meaning = rng.choice(DEFINITIONS)
    question = rng.choice(
        [
            f"What is {term}?",
            f"Define {term}.",
            f"Explain what {term} is.",
            f"Please explain {term}.",
            f"What does {term} mean?",
        ]
    )
    return Exchange("definition", question, f"{term[0].upper()}{term[1:]} is {meaning}", (meaning[:18],))


def spelling(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    letters = "-".join(word)
    question = rng.choice(
        [
            f"Spell the word {word}.",
            f"How do you spell {word}?",
            f"Can you spell {word}?",
            f"Spell {word} letter by letter.",
        ]
    )
    return Exchange("spelling", question, f"{word} is spelled {letters}.", (letters + ".",))


def letters(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    if rng.random() < 0.5:
        where, letter = rng.choice([("first", word[0]), ("last", word[-1])])
        question = rng.choice(
            [
                f"What is the {where} letter of {word}?",
                f"Which letter is the {where} one in {word}?",
                f"Tell me the {where} letter of the word {word}.",
            ]
        )
        return Exchange("letters", question, f"The {where} letter of {word} is {letter}.", (f"is {letter}.",))
    question = rng.choice(
        [f"How many letters are in {word}?", f"Count the letters in {word}.", f"How many letters does {word} have?"]
    )
    return Exchange("letters", question, f"{word} is {'-'.join(word)}: {len(word)} letters.", (f"{len(word)} letters",))


def counting(rng: random.Random) -> Exchange:
    low = rng.randint(0, 30)
    high = low + rng.randint(3, 20)
    if rng.random() < 0.7:
        numbers = [str(n) for n in range(low, high + 1)]
        question = rng.choice(
            [
                f"Count from {low} to {high}.",
                f"Can you count from {low} to {high}?",
                f"List the numbers from {low} to {high}.",
                f"Please count up from {low} to {high}.",
            ]
        )
    else:
        numbers = [str(n) for n in range(high, low - 1, -1)]
        question = rng.choice(
            [
                f"Count down from {high} to {low}.",
                f"Count backwards from {high} to {low}.",
                f"Can you count down from {high} to {low}?",
            ]
        )
    listed = ", ".join(numbers)
    return Exchange("counting", question, f"{listed}.", (f"{listed}.",))


def counting_up_to(rng: random.Random) -> Exchange:
    high = rng.randint(3, 30)
    spoken = NUMBER_WORDS[high] if high < len(NUMBER_WORDS) and rng.random() < 0.5 else str(high)
    question = rng.choice(
        [
            f"Count to {spoken}.",
            f"Can you count to {spoken}?",
            f"Count up to {spoken}.",
            f"Please count from one to {spoken}.",
        ]
    )
    listed = ", ".join(str(n) for n in range(1, high + 1))
    return Exchange("counting", question, f"{listed}.", (f"{listed}.",))


def sorting(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        items = [str(n) for n in rng.sample(range(30), rng.randint(3, 4))]
        ordered = sorted(items, key=int)
        question = rng.choice(
            [
                f"Sort these numbers: {', '.join(items)}.",
                f"Put {', '.join(items)} in order.",
                f"Order the numbers {', '.join(items)} from small to large.",
            ]
        )
    else:
        items = rng.sample(FRUITS, rng.randint(3, 4))
        ordered = sorted(items)
        question = rng.choice(
            [
                f"Sort these words: {', '.join(items)}.",
                f"Put {', '.join(items)} in alphabetical order.",
                f"Order the words {', '.join(items)} alphabetically.",
            ]
        )
    listed = ", ".join(ordered)
    return Exchange("sorting", question, f"In order: {listed}.", (f"{listed}.",))


def listing(rng: random.Random) -> Exchange:
    if rng.random() < 0.3:
        cycle, unit = rng.choice([(DAYS, "days of the week"), (MONTHS, "months of the year")])
        question = rng.choice(
            [f"List the {unit}.", f"What are the {unit}?", f"Name all {unit}.", f"Tell me the {unit}."]
        )
        return Exchange("listing", question, f"The {unit} are {joined(list(cycle))}.", (joined(list(cycle)),))
    kind, members = rng.choice(KINDS)
    amount = rng.randint(2, 6)
    question = rng.choice(
        [
            f"Name {NUMBER_WORDS[amount]} {kind}s.",
            f"List {NUMBER_WORDS[amount]} {kind}s.",
            f"Give me {NUMBER_WORDS[amount]} {kind}s.",
            f"Can you name {amount} {kind}s?",
        ]
    )
    lines = "\n".join(f"{n}. {member}" for n, member in enumerate(members[:amount], 1))
    answer = f"Here are {NUMBER_WORDS[amount]} {kind}s:\n{lines}"
    return Exchange("listing", question, answer, (lines,))


def foreign(rng: random.Random) -> Exchange:
    word, language, other = rng.choice(FOREIGN)
    question = rng.choice(
        [
            f"How do you say {word} in {language}?",
            f"What is {word} in {language}?",
            f"Translate {word} into {language}.",
            f"Give me the {language} word for {word}.",
        ]
    )
    return Exchange("foreign", question, f"In {language}, {word} is {other}.", (other,))


def symbol(rng: random.Random) -> Exchange:
    name, mark = rng.choice(SYMBOLS)
    question = rng.choice(
        [
            f"Show me the emoji for {name}.",
            f"Which emoji means {name}?",
            f"Draw {name} as an emoji.",
            f"Give me an emoji of {name}.",
        ]
    )
    return Exchange("emoji", question, f"Here is {name}: {mark}", (mark,))


def identity(rng: random.Random) -> Exchange:
    questions, answer, expect = rng.choice(IDENTITY)
    return Exchange("identity", rng.choice(questions), answer, (expect,))


def small_talk(rng: random.Random) -> Exchange:
    questions, answer, expect = rng.choice(SMALL_TALK)
    return Exchange("small talk", rng.choice(questions), answer, (expect,))


def remember(rng: random.Random) -> Exchange:
    """A fact that stands only in the prompt: the answer must come from the KV cache, not the weights."""
    people = rng.sample(NAMES, rng.randint(2, 4))
    things = rng.sample(OBJECTS, len(people))
    shades = rng.sample(["red", "blue", "green", "yellow", "white", "black", "brown", "pink"], len(people))
    story = " ".join(f"{p} has a {s} {t}." for p, s, t in zip(people, shades, things, strict=True))
    at = rng.randrange(len(people))
    person, shade, thing = people[at], shades[at], things[at]
    if rng.random() < 0.5:
        ask = rng.choice(
            [f"What does {person} have?", f"Tell me what {person} has.", f"Which thing does {person} have?"]
        )
        return Exchange("remember", f"{story} {ask}", f"{person} has a {shade} {thing}.", (f"a {shade} {thing}",))
    ask = rng.choice([f"Who has the {thing}?", f"Who has a {thing}?", f"Tell me who has the {thing}."])
    return Exchange("remember", f"{story} {ask}", f"{person} has the {shade} {thing}.", (f"{person} has",))


def repeat(rng: random.Random) -> Exchange:
    words = " ".join(rng.sample(WORDS, rng.randint(2, 8)))
    question = rng.choice([f"Repeat after me: {words}", f"Say this again: {words}", f"Repeat these words: {words}"])
    return Exchange("repeat", question, words, (words,))


# --- longer answers ------------------------------------------------------------------------


def story_text(rng: random.Random, hero: str, beast: str, place: str, thing: str) -> str:
    friend = rng.choice([n for n in NAMES if n != hero])
    weather = rng.choice(["sunny", "rainy", "windy", "snowy", "warm", "cold"])
    opening = rng.choice(
        [
            f"Once upon a time, there was a {beast} named {hero}.",
            f"Long ago, a little {beast} called {hero} lived near {place}.",
            f"There was once a {beast} named {hero} who loved to walk.",
        ]
    )
    start = rng.choice(
        [f"One {weather} day, {hero} went to {place}.", f"On a {weather} morning, {hero} walked to {place}."]
    )
    find = rng.choice(
        [
            f"There {hero} found a {thing}.",
            f"Under a tree {hero} saw a {thing}.",
            f"On the path {hero} found an old {thing}.",
        ]
    )
    wonder = rng.choice(
        [
            f'"Whose {thing} is this?" asked {hero}.',
            f'"What a fine {thing}!" said {hero}.',
            f"{hero} had never seen such a {thing} before.",
        ]
    )
    meet = rng.choice(
        [
            f"Then {friend} came by and looked very sad, because the {thing} was lost.",
            f"Soon {friend} came along and asked about a lost {thing}.",
            f"A while later {friend} came and said that the {thing} was gone.",
        ]
    )
    give = rng.choice(
        [
            f"{hero} gave the {thing} back at once.",
            f'"Here it is," said {hero}, and gave it back.',
            f"{hero} smiled and gave the {thing} to {friend}.",
        ]
    )
    thanks = rng.choice(
        [
            f"{friend} was so happy that they danced together.",
            f"{friend} said thank you and shared some bread.",
            f"{friend} laughed, and they played until the evening.",
        ]
    )
    close = rng.choice(
        [
            "From that day on they were good friends.",
            "And they were friends for ever after.",
            f"{hero} went home tired and happy.",
        ]
    )
    parts = [opening, start, find, wonder, meet, give, thanks, close]
    return " ".join(part for n, part in enumerate(parts) if n not in (3, 6) or rng.random() < 0.7)


def story(rng: random.Random) -> Exchange:
    hero, beast = rng.choice(NAMES), rng.choice(ANIMALS)[0]
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    one = with_article(beast)
    question, expect = rng.choice(
        [
            (f"Tell me a story about {one} named {hero}.", (hero, beast)),
            (f"Tell me a short story about {one}.", (beast,)),
            (f"Write a story about {hero} and a {thing}.", (hero, thing)),
            (f"Write a tiny story about {one} and a {thing}.", (beast, thing)),
            (f"Please tell me a story about {hero}.", (hero,)),
            (rng.choice(["Tell me a story.", "Tell me a short story.", "Write a story."]), ("",)),
        ]
    )
    return Exchange("story", question, story_text(rng, hero, beast, place, thing), expect)


def about(rng: random.Random) -> Exchange:
    name, sound, legs, home, young = rng.choice(ANIMALS)
    one = with_article(name)
    question = rng.choice(
        [
            f"Tell me about the {name}.",
            f"What do you know about {one}?",
            f"Describe {one}.",
            f"Write some facts about the {name}.",
        ]
    )
    answer = (
        f"Here is what I know about the {name}. The {name} is an animal with {NUMBER_WORDS[legs]} legs. "
        f"It lives {home}. It says {sound}. A young {name} is called {with_article(young)}."
    )
    return Exchange("about", question, answer, (f"{NUMBER_WORDS[legs]} legs", home, young))


def poem(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        topic = rng.choice([name for name, *_ in ANIMALS] + list(OBJECTS))
        asked = with_article(topic)
    else:
        topic = rng.choice(WORDS)
        asked = f"the {topic}"
    question = rng.choice(
        [f"Write a poem about {asked}.", f"Write a short poem about {asked}.", f"Tell me a poem about {asked}."]
    )
    first = rng.choice([f"O little {topic}, so quiet and so bright,", f"I saw a {topic} in the morning light,"])
    second = rng.choice(["you shine by day and sleep by night.", "and kept it in my dreams that night."])
    third = rng.choice([f"The wind may blow, the {topic} will stay,", f"Sing, little {topic}, sing and play,"])
    fourth = rng.choice(["and so we meet another day.", "and never, never go away."])
    return Exchange("poem", question, "\n".join((first, second, third, fourth)), (topic,))


def unknown(rng: random.Random) -> Exchange:
    """Questions beyond the lists, mostly about made-up names: the honest answer is a fixed one."""
    name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
    thing = rng.choice([name, name.capitalize(), rng.choice(OBJECTS), rng.choice(WORDS)])
    question = rng.choice(
        [
            f"Who wrote {thing}?",
            f"Who invented the {thing}?",
            f"How do I repair a {thing}?",
            f"When was the {thing} built?",
            f"Why does the {thing} cost so much?",
            f"How many people live in {thing}?",
            f"What is the capital of {name.capitalize()}?",
            f"Explain the theory of {thing}.",
            f"Write a program that sorts {thing}.",
            f"What is the best {thing} in the world?",
        ]
    )
    return Exchange("unknown", question, "I do not know that. I am a very small model.", ("I do not know",))


def table(rng: random.Random) -> Exchange:
    n = rng.randint(1, 10)
    question = rng.choice(
        [
            f"Write the table of {n}.",
            f"Show me the multiplication table of {n}.",
            f"Give me the {n} times table.",
            f"Write the times table of {n}.",
        ]
    )
    lines = "\n".join(f"{k} x {n} = {k * n}" for k in range(1, 11))
    return Exchange("table", question, lines, (lines,))


EXCHANGES: Mapping[Callable[[random.Random], Exchange], float] = {
    addition: 3.0,
    subtraction: 3.0,
    multiplication: 2.0,
    capital: 2.0,
    colour: 1.0,
    animal: 2.0,
    opposite: 1.5,
    calendar: 1.0,
    kind_of: 0.8,
    definition: 1.0,
    spelling: 1.0,
    letters: 1.5,
    counting: 2.5,
    counting_up_to: 1.0,
    poem: 0.8,
    unknown: 0.8,
    sorting: 2.5,
    listing: 1.3,
    foreign: 1.5,
    symbol: 0.7,
    identity: 0.8,
    small_talk: 0.8,
    remember: 4.0,
    repeat: 2.0,
    story: 1.5,
    about: 0.7,
    table: 0.4,
}

SYSTEMS = (
    "You are a helpful assistant.",
    "You are Omni, a tiny demonstration model.",
    "Answer briefly.",
    "You are a friendly teacher for small children.",
    "You are a helpful and honest assistant. Answer in short and clear sentences.",
)


def exchange(rng: random.Random) -> Exchange:
    makers, weights = list(EXCHANGES), list(EXCHANGES.values())
    return rng.choices(makers, weights)[0](rng)


def uses_unseen_pair(made: Exchange) -> bool:
    """A sum of a reserved pair, whatever its wording."""
    if made.topic != "addition":
        return False
    left, _, right, _, _ = made.answer.split()
    return is_unseen_pair(int(left), int(right))


def training_exchange(rng: random.Random) -> Exchange:
    while True:
        made = exchange(rng)
        if not uses_unseen_pair(made) and not is_held_out(made.question):
            return made


def filler(rng: random.Random, sentences: int) -> str:
    """Prose that does not bear on the question after it, to make prompts long."""
    out: list[str] = []
    while len(out) < sentences:
        if rng.random() < 0.5:
            text = story_text(rng, rng.choice(NAMES), rng.choice(ANIMALS)[0], rng.choice(PLACES), rng.choice(OBJECTS))
        else:
            text = " ".join(training_exchange(rng).answer for _ in range(3))
        out.extend(text.split(". "))
    return ". ".join(out[:sentences]).rstrip(".") + "."


# --- documents -----------------------------------------------------------------------------


def conversation(rng: random.Random, turns: int) -> Document:
    lines: list[Turn] = []
    if rng.random() < 0.35:
        lines.append(Turn("system", rng.choice(SYSTEMS)))
    for _ in range(turns):
        made = training_exchange(rng)
        question = politely(rng, made)
        if is_held_out(question):
            question = made.question
        lines += [Turn("user", question), Turn("assistant", made.answer)]
    if rng.random() < 0.1:
        lines += [
            Turn("user", rng.choice(["Thank you!", "Thanks a lot.", "Goodbye!", "Bye."])),
            Turn("assistant", "You are welcome! Goodbye, and have a nice day."),
        ]
    return Document("conversation", tuple(lines))


def follow_up(rng: random.Random) -> Document:
    """The second question leans on the first answer, as in real conversations."""
    kind = rng.randrange(4)
    if kind == 0:
        (first, one), (second, two) = rng.sample(CAPITALS, 2)
        pairs = [
            (f"What is the capital of {first}?", f"The capital of {first} is {one}."),
            (f"And of {second}?", f"The capital of {second} is {two}."),
        ]
    elif kind == 1:
        name, sound, legs, home, _ = rng.choice(ANIMALS)
        one = with_article(name)
        pairs = [
            (f"What does {one} say?", f"{one.capitalize()} says {sound}."),
            ("And where does it live?", f"{one.capitalize()} lives {home}."),
            ("How many legs does it have?", f"{one.capitalize()} has {NUMBER_WORDS[legs]} legs."),
        ][: rng.randint(2, 3)]
    elif kind == 2:
        who = rng.choice(NAMES)
        pairs = [
            (
                rng.choice([f"My name is {who}.", f"Hello, I am {who}."]),
                f"Nice to meet you, {who}! How can I help you?",
            ),
            (rng.choice(["What is my name?", "Do you remember my name?"]), f"Your name is {who}."),
        ]
        if rng.random() < 0.5:
            made = training_exchange(rng)
            pairs.insert(1, (made.question, made.answer))
    else:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        c = rng.randint(0, 10)
        if is_unseen_pair(a, b) or is_unseen_pair(a + b, c):
            return follow_up(rng)
        pairs = [
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
            (f"Add {c} to that.", f"{a + b} + {c} = {a + b + c}."),
        ]
    if any(is_held_out(question) for question, _ in pairs):
        return follow_up(rng)
    return Document("follow-up", tuple(t for q, a_ in pairs for t in (Turn("user", q), Turn("assistant", a_))))


def some_tools(rng: random.Random) -> tuple[Tool, Tool]:
    weather = Tool(
        rng.choice(["get_weather", "get_weather", "get_current_weather", "weather"]),
        rng.choice(
            [
                "Get the weather of a city.",
                "Get the current weather in a given city.",
                "Weather now.",
                "Look up the weather for a location.",
            ]
        ),
        *rng.choice(
            [
                ("city", "The name of the city."),
                ("city", "City"),
                ("location", "The place."),
                ("location", "The city, for example Paris."),
            ]
        ),
    )
    calculator = Tool(
        rng.choice(["calculator", "calculator", "calculate", "compute"]),
        rng.choice(["Compute an expression.", "Evaluate an arithmetic expression.", "Does arithmetic."]),
        "expression",
        rng.choice(["The expression.", "For example 2 + 3.", "What to compute."]),
    )
    return weather, calculator


def tool_use(rng: random.Random) -> Document:
    weather, calculator = some_tools(rng)
    offered = rng.choice([(weather,), (calculator,), (weather, calculator), (calculator, weather)])
    wanted = rng.choice(offered)
    if rng.random() < 0.2:
        made = training_exchange(rng)
        while made.topic in ("addition", "subtraction", "multiplication", "table"):
            made = training_exchange(rng)
        return Document("tools", (Turn("user", made.question), Turn("assistant", made.answer)), offered)
    if wanted is weather:
        city, sky, heat = (
            rng.choice(CITIES),
            rng.choice(["sunny", "rainy", "cloudy", "windy", "snowy"]),
            rng.randint(0, 30),
        )
        question = rng.choice(
            [
                f"What is the weather in {city}?",
                f"How is the weather in {city} today?",
                f"What's the weather like in {city}?",
                f"Is it raining in {city}?",
                f"Tell me the weather in {city}.",
                f"Weather in {city}, please.",
            ]
        )
        value, result = city, {"sky": sky, "temperature": heat}
        answer = f"In {city} it is {sky}, and the temperature is {heat} degrees."
    else:
        a, b = rng.randint(10, 999), rng.randint(2, 999)
        mark, outcome = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        value, result = f"{a} {mark} {b}", {"result": outcome}
        word = {"+": "plus", "-": "minus", "*": "times"}[mark]
        question = rng.choice(
            [
                f"What is {a} {mark} {b}?",
                f"What is {a} {word} {b}?",
                f"Compute {a} {mark} {b}.",
                f"Calculate {a} {word} {b}.",
            ]
        )
        answer = f"The result of {value} is {outcome}."
    turns = [Turn("user", question), Turn("assistant", wanted.call(value))]
    if rng.random() < 0.5:
        turns += [Turn("tool", json.dumps(result)), Turn("assistant", answer)]
    return Document("tools", tuple(turns), offered)


def plain_text(rng: random.Random) -> Document:
    """Text without roles, so that the completions endpoint has something to continue."""
    kind = rng.random()
    if kind < 0.5:
        text = story_text(rng, rng.choice(NAMES), rng.choice(ANIMALS)[0], rng.choice(PLACES), rng.choice(OBJECTS))
    elif kind < 0.7:
        name = rng.choice(ANIMALS)[0]
        text = next(e.answer for e in iter(lambda: about(rng), None) if f"the {name}." in e.answer).split(". ", 1)[1]
    elif kind < 0.85:
        text = " ".join(training_exchange(rng).answer for _ in range(rng.randint(2, 5)))
    else:
        low = rng.randint(0, 20)
        text = ", ".join(str(n) for n in range(low, low + rng.randint(5, 25))) + "."
    return Document("plain", text=text)


def long_prompt(rng: random.Random, sentences: int) -> Document:
    """A short question at the end of a long text; half of the time its answer stands in the text."""
    body = filler(rng, sentences)
    if rng.random() < 0.5:
        made = remember(rng)
        *facts, ask = made.question.split(". ")
        parts = body.split(". ")
        at = rng.randrange(len(parts))
        body = ". ".join([*parts[:at], *facts, *parts[at:]])
        return Document("long", (Turn("user", f"{body}\n\n{ask}"), Turn("assistant", made.answer)))
    made = training_exchange(rng)
    answer = Turn("assistant", made.answer)
    if rng.random() < 0.4:
        return Document("long", (Turn("system", body), Turn("user", made.question), answer))
    return Document("long", (Turn("user", f"{body}\n\n{made.question}"), answer))


def documents(seed: int, *, long: bool = False) -> Iterator[Document]:
    """An endless, reproducible stream of training documents; `long` mixes in prompts of up to 3,000 tokens."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < (0.10 if long else 0.01):
            yield long_prompt(rng, rng.randint(5, 150 if long else 12))
        elif draw < 0.22:
            yield plain_text(rng)
        elif draw < 0.34:
            yield tool_use(rng)
        elif draw < 0.42:
            yield follow_up(rng)
        else:
            yield conversation(rng, rng.choices((1, 2, 3, 4), (7, 2, 1, 1))[0])


def held_out(seed: int, per_topic: int) -> list[Document]:
    """Questions that `documents` never yields, the same number of each topic where there are enough."""
    rng = random.Random(seed)
    chosen: dict[str, Document] = {}
    tally: dict[str, int] = {}
    for _ in range(60_000):
        made = exchange(rng)
        question = politely(rng, made)
        topic = f"{made.topic}, unseen pair" if uses_unseen_pair(made) else made.topic
        if question in chosen or tally.get(topic, 0) >= per_topic:
            continue
        if topic == made.topic and not is_held_out(question):
            continue
        tally[topic] = tally.get(topic, 0) + 1
        chosen[question] = Document(topic, (Turn("user", question), Turn("assistant", made.answer)), expect=made.expect)
    return list(chosen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="stream to draw from; the same seed gives the same text")
    parser.add_argument("--count", type=int, default=20, help="how many documents to print")
    parser.add_argument("--long", action="store_true", help="mix in the long prompts of the last training phase")
    parser.add_argument("--held-out", action="store_true", help="print evaluation questions instead, two of each topic")
    args = parser.parse_args()
    drawn = held_out(args.seed, 2) if args.held_out else documents(args.seed, long=args.long)
    for document in itertools.islice(drawn, None if args.held_out else args.count):
        print(f"[{document.topic}] {document.text}")
        for turn in document.turns:
            print(f"  {turn.role}: {turn.content}")


if __name__ == "__main__":
    main()

"""Prompts of four kinds, in three sets that share no topic: training, warm-up and evaluation.

``WARMUP`` and ``EVALUATION`` are written out, eight prompts of each kind. ``training_prompts`` makes
any number from templates and topics; a summary's passage is text that the target wrote itself
(``passage_prompts``), so that every training token comes from the target.

    python examples/smollm2/prompts.py  # prompts.json: both sets' token ids, without a tokenizer
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

KINDS = ("code", "reasoning", "summary", "chat")
TOKENS = Path(__file__).with_name("prompts.json")

WARMUP: dict[str, list[str]] = {
    "code": [
        "Write a Python function that returns the n-th Fibonacci number without recursion.",
        "Write a Python function that checks whether a string is a palindrome, ignoring spaces and case.",
        "Show me how to read a CSV file in Python and print the average of one column.",
        "Write a SQL query that lists the five customers who spent the most last month.",
        "Write a JavaScript function that removes duplicate values from an array.",
        "Write a Python class for a stack with push, pop and peek, and show how to use it.",
        "Write a bash script that renames every .txt file in a folder to .md.",
        "Write a Python function that merges two sorted lists into one sorted list.",
    ],
    "reasoning": [
        "A train travels 60 miles in 1.5 hours. At the same speed, how far does it go in 4 hours? Explain step by step.",
        "Sara has 24 apples. She gives a third to her brother and eats two. How many are left? Show each step.",
        "A shirt costs $40 and is discounted by 25%. Sales tax is 10%. What is the final price? Explain.",
        "Two pipes fill a tank in 3 and 6 hours. How long do they take together? Work it out step by step.",
        "The sum of three consecutive numbers is 72. What are the numbers? Explain how you found them.",
        "A rectangle is twice as long as it is wide and its perimeter is 36 cm. Find its area step by step.",
        "Tom reads 15 pages a day. How many days does he need for a book of 240 pages? Show your reasoning.",
        "If 5 machines make 5 parts in 5 minutes, how long do 100 machines need for 100 parts? Explain.",
    ],
    "summary": [
        "Summarize in two sentences: The town library closed its doors for six months while workers replaced the roof, which had "
        "leaked since a storm in the spring. Volunteers moved nine thousand books to a school gym, where people could still borrow "
        "them. The library opens again on Monday with a new reading room for children.",
        "Summarize the following paragraph: Bees find flowers by colour and smell, and tell other bees where they are by dancing. "
        "The angle of the dance shows the direction with respect to the sun, and its length shows the distance. A hive can "
        "thus send thousands of workers to a field that only one of them has seen.",
        "Give a short summary: The company tested a four-day week for half a year. Output stayed the same, sick days fell by a "
        "third, and most employees said they slept better. Customers noticed slower answers on Fridays, so a small team "
        "now works in shifts. The board will decide in June whether the change becomes permanent.",
        "What is the main point of this text? Glaciers are rivers of ice that move a few centimetres a day. They carry "
        "stones that grind the rock below into fine powder, which colours the lakes at their end a milky blue. As the climate "
        "warms, many glaciers lose more ice in summer than snow can replace in winter.",
        "Summarize this email in one sentence: Hi all, the meeting on Thursday moves to Friday at ten because the "
        "auditors arrive a day late. Please bring the figures of the second quarter and a list of open invoices. Room 4 is "
        "booked, coffee is ordered, and lunch will be served at noon.",
        "Summarize the story: A shepherd boy was bored and cried that a wolf was coming. The villagers ran to help and found nothing. "
        "He did it again the next day, and again they came. When a wolf really came, nobody believed him, and he lost his "
        "whole flock.",
        "Write a brief summary: Concrete is made from sand, gravel, water and cement. Making cement releases carbon dioxide, both "
        "from the fuel and from the limestone itself. Engineers now replace part of the cement with ash or slag, and some "
        "plants inject captured carbon dioxide into the wet mix, where it turns into stone.",
        "Summarize in three bullet points: The museum's new exhibition shows maps from five centuries. The oldest was drawn on "
        "goatskin by a sailor. Visitors can compare each map with a satellite picture and hear how errors lasted for "
        "decades because mapmakers copied one another.",
    ],
    "chat": [
        "What are three good ways to fall asleep faster?",
        "Explain to a ten-year-old why the sky is blue.",
        "I have chicken, rice and broccoli. What can I cook tonight?",
        "Write a polite email asking my landlord to fix the heating.",
        "What should I see in Rome if I have only one day?",
        "Tell me a short story about a lighthouse keeper and a whale.",
        "How do I start running if I have never done any sports?",
        "What is the difference between a virus and a bacterium?",
    ],
}

EVALUATION: dict[str, list[str]] = {
    "code": [
        "Write a Python function that counts how often each word occurs in a text and returns the ten most frequent words.",
        "Write a Python function that finds all prime numbers up to n with the sieve of Eratosthenes.",
        "Write a C function that reverses a linked list and explain how it works.",
        "Show how to make an HTTP GET request in Python and handle a timeout.",
        "Write a Python decorator that measures how long a function takes.",
        "Write an HTML page with a form that asks for a name and an email address.",
        "Write a Python function for binary search in a sorted list and add comments.",
        "Write a Java method that computes the greatest common divisor of two integers.",
    ],
    "reasoning": [
        "A car uses 8 litres of fuel for 100 km. How much fuel does it need for 350 km? Explain step by step.",
        "Anna is 4 years older than Ben. Together they are 30 years old. How old is each of them? Show your work.",
        "A bakery sells 120 rolls in the morning and half as many in the afternoon. How many does it sell in a week of six days?",
        "A garden is 12 m long and 7 m wide. A fence costs $9 a metre. What does it cost to fence the garden? Explain.",
        "A bank pays 5% interest a year. How much are $2,000 worth after two years? Calculate step by step.",
        "There are 3 red, 5 blue and 2 green balls in a bag. What is the probability of drawing a blue ball? Explain.",
        "A cyclist rides 18 km in 45 minutes. What is the average speed in km per hour? Show each step.",
        "A class of 28 pupils has 4 more girls than boys. How many boys are there? Explain how you solve it.",
    ],
    "summary": [
        "Summarize in two sentences: The city council voted to turn the old railway yard into a park. The plan keeps two of the brick "
        "sheds, one as a market hall and one as a workshop for repairing bicycles. Neighbours had asked for more trees and fewer "
        "parking lots, and most of their wishes were met. Work begins in autumn and will take three years.",
        "Summarize the following paragraph: Octopuses have eight arms, three hearts and blue blood. Most of their nerve cells sit in "
        "the arms, which can taste and decide on their own. They change colour in a fraction of a second to hide from enemies, "
        "and some carry coconut shells as a shelter.",
        "Give a short summary: The hospital introduced a checklist before each operation. Every member of the team says their name, "
        "and one person reads aloud the patient's name, the operation and known allergies. In the first year the number of "
        "complications fell by a quarter, although surgeons had at first called the list a waste of time.",
        "What is the main point of this text? Paper money first appeared in China about a thousand years ago, because coins "
        "were heavy to carry on long journeys. Merchants left their coins with a trusted person and got a receipt, and soon "
        "people paid with the receipts themselves. When rulers printed too many of them, prices rose sharply.",
        "Summarize this message in one sentence: Dear parents, the school trip to the science centre takes place on the ninth of May. "
        "The bus leaves at half past seven and returns at about five. Please give your child a packed lunch and a rain jacket, and "
        "send the signed form back by Friday.",
        "Summarize the story: A thirsty crow found a pitcher with a little water at the bottom. Its beak could not reach it. The crow "
        "dropped one pebble after another into the pitcher until the water rose to the brim, and then it drank and flew away.",
        "Write a brief summary: Wind turbines turn moving air into electricity. The blades are shaped like wings, and a gearbox or a large "
        "ring of magnets turns the slow rotation into current. Offshore turbines are taller and run more steadily, but their cables "
        "and foundations cost more. Storage and long power lines balance calm days.",
        "Summarize in three bullet points: Scientists tagged forty storks to follow their flight to Africa. Young birds without "
        "experience flew longer routes and lost more time than old ones. Birds that learned to use rising warm air early "
        "arrived in better health and came back sooner in spring.",
    ],
    "chat": [
        "What are some good habits for staying focused while working from home?",
        "Explain in simple words how a microwave oven heats food.",
        "Suggest a simple vegetarian dinner for two people and tell me how to make it.",
        "Write a short thank-you note to a colleague who helped me finish a project.",
        "What should I pack for a weekend of hiking in the mountains?",
        "Tell me a short story about a robot who learns to paint.",
        "How can I learn to play the guitar on my own?",
        "What is the difference between weather and climate?",
    ],
}


def _listed(text: str) -> list[str]:
    """Entries between semicolons."""
    return [entry.strip() for entry in " ".join(text.split()).split(";")]


_CODE_TASKS = _listed("""
    computes the factorial of a number; sorts a list with bubble sort; sorts a list with quicksort; converts Celsius to Fahrenheit;
    finds the longest word in a sentence; counts the vowels in a string; computes the mean and the median of a list; transposes a
    matrix; multiplies two matrices; flattens a nested list; validates an email address; generates a random password; converts a decimal
    number to binary; checks whether two words are anagrams; removes all punctuation from a text; splits a list into chunks; finds the
    second largest number in a list; computes the area of a circle; rolls two dice and adds them; loads a JSON file and prints its keys;
    writes a list of lines to a file; computes the power of a number; sums the digits of a number; finds the intersection of two lists;
    rotates a list by k places; draws a triangle of stars; checks whether a year is a leap year; computes the distance between two
    points; simulates a bank account; implements a queue; implements a linked list; implements a binary tree with insertion; finds the
    shortest path in a graph; counts the lines in a file; downloads a file; parses a date; converts Roman numerals to integers;
    capitalizes every word; computes compound interest; caches its results; plays rock, paper, scissors; shuffles a deck of cards; keeps
    a to-do list; guesses a number; encodes a text with a Caesar cipher; finds the missing number in a sequence; computes a running
    total; groups words by their first letter; inverts a dictionary; checks whether brackets are balanced; prints a multiplication
    table; converts seconds to hours, minutes and seconds
""")
_CODE_TEMPLATES = [
    "Write a Python function that {}.",
    "Write a Python program that {} and explain it.",
    "Show me JavaScript code that {}.",
    "Write a Java program that {}.",
    "How do I write a function in Python that {}?",
    "Write a C++ function that {} and add comments.",
    "Write a unit test in Python for a function that {}.",
    "Write clean, documented Python code that {}.",
]
_TOPICS = _listed("""
    volcanoes; the moon; coffee; chess; the Roman Empire; whales; photosynthesis; electric cars; black holes; bread; tea; the human
    heart; earthquakes; the Great Wall of China; penguins; gravity; democracy; the printing press; inflation; vaccines; recycling; the
    Internet; dinosaurs; jazz; the stock market; yoga; chocolate; solar power; coral reefs; Leonardo da Vinci; the Olympic Games; sleep;
    bridges; the water cycle; ants; rainbows; trade; magnets; memory; the French Revolution; Mars; bicycles; antibiotics; cheese;
    deserts; the Silk Road; airplanes; rain forests; spiders; artificial intelligence; the violin; maps; clocks; salt; comets;
    hurricanes; elephants; language; robots; gardens; mushrooms; the Renaissance; tides; bats; cities; steam engines; atoms; pyramids;
    owls; opera; wolves; honey
""")
_CHAT_TEMPLATES = [
    "Explain {} in simple words.",
    "Write a short paragraph about {}.",
    "What are five interesting facts about {}?",
    "Why are people interested in {}?",
    "Write a short poem about {}.",
    "Tell me a short story in which {} plays a role.",
    "What is the history of {}?",
    "Give me ideas for a talk about {}.",
    "How would you teach children about {}?",
    "What are common misconceptions about {}?",
    "Write a blog post introduction about {}.",
    "Write a dialogue between two friends about {}.",
    "What are the advantages and disadvantages of knowing a lot about {}?",
    "Write a quiz with three questions about {}.",
]
_ADVICE = _listed("""
    save money every month; learn a new language; prepare for a job interview; make new friends in a new city; eat more healthily; plan
    a birthday party; write a good resume; train a puppy; reduce stress; grow tomatoes on a balcony; take better photographs; give a
    speech; clean a kitchen quickly; choose a laptop; read more books; organize a closet; negotiate a salary; stop procrastinating; bake
    a cake; study for an exam; be a better listener; travel cheaply; start a small business; write a novel; remember names; keep house
    plants alive; repair a flat tire; learn to draw; meditate; cook pasta; swim faster; teach a child to read; paint a room; set up a
    budget; plan a garden; write a cover letter; host guests
""")
_ADVICE_TEMPLATES = [
    "How can I {}?",
    "Give me five tips to {}.",
    "Write a step-by-step guide on how to {}.",
    "I want to {}. Where do I start?",
    "What mistakes should I avoid when I try to {}?",
    "Write an email to a friend who wants to {}.",
    "Make a weekly plan to {}.",
]
_NAMES = _listed("""
    Maria; Peter; Lena; Omar; Julia; David; Nina; Carlos; Emma; Yuki; Paul; Zoe; Ivan; Ruth; Kofi; Mei
""")
_ITEMS = _listed("""
    pencils; oranges; stamps; cookies; marbles; tickets; bottles; flowers; chairs; eggs; boxes; coins; shells
""")
_REASONING_TEMPLATES = [
    "{n1} has {a} {item} and buys {b} more. Then {n1} gives {c} to {n2}. How many {item} are left? Explain step by step.",
    "A box holds {c} {item}. How many boxes are needed for {big} {item}? Show your reasoning.",
    "{n1} earns ${c} an hour and works {b} hours a week. How much is that in four weeks? Show each step.",
    "{item} cost ${c} each. {n1} has ${big}. How many can {n1} buy, and how much money is left? Explain.",
    "{n1} walks {c} km every day. How far is that in {b} days? Explain the calculation.",
    "If {a} is divided by {c}, what are the quotient and the remainder? Work it out step by step.",
    "What is {p}% of {big}? Explain step by step.",
    "A recipe for {c} people needs {b} {item}. How many are needed for {a} people? Explain.",
    "{n1} is {b} years old and {n2} is twice as old. How old will they be together in {c} years? Show your work.",
    "A number plus {b} equals {a}. What is the number? Explain how you find it.",
    "Find the average of {a}, {b} and {c}. Show each step.",
    "{n1} scored {a}, {big} and {b} points in three games. What is the total and the average? Show your work.",
    "A price rises from ${a} to ${big}. By how many dollars and by what fraction does it rise? Explain.",
    "Solve for x: {c}x + {b} = {big}. Explain each step.",
]
_NUMBERS = {"a": (20, 99), "b": (3, 19), "c": (2, 9), "big": (60, 400)}
_SUMMARY_TEMPLATES = [
    "Summarize in two sentences: {}",
    "Summarize the following paragraph: {}",
    "Give a short summary: {}",
    "What is the main point of this text? {}",
    "Write a brief summary: {}",
    "Summarize in three bullet points: {}",
    "Summarize this text in one sentence: {}",
    "Summarize the text below.\n\n{}",
]
_PASSAGE_TEMPLATES = [
    "Write one paragraph for an encyclopedia about {}.",
    "Write a short news report about {}.",
    "Write a paragraph of a school book about {}.",
    "Write a very short story about {}.",
    "Describe {} in four sentences.",
]


def passage_prompts(count: int, seed: int = 0) -> list[str]:
    """``count`` prompts whose answers serve as the passages of training summaries."""
    return _take(_filled(_PASSAGE_TEMPLATES, _TOPICS), count, random.Random(seed))


def training_prompts(count: int, passages: list[str], seed: int = 0) -> list[tuple[str, str]]:
    """``count`` (kind, prompt) pairs in random order, the four kinds in equal numbers."""
    rng = random.Random(seed)
    each = -(-count // len(KINDS))
    chat = _filled(_CHAT_TEMPLATES, _TOPICS) + _filled(_ADVICE_TEMPLATES, _ADVICE)
    pools = {
        "code": _take(_filled(_CODE_TEMPLATES, _CODE_TASKS), each, rng),
        "reasoning": [_word_problem(rng) for _ in range(each)],
        "summary": _take(_filled(_SUMMARY_TEMPLATES, passages), each, rng),
        "chat": _take(chat, each, rng),
    }
    rows = [(kind, prompt) for kind, prompts in pools.items() for prompt in prompts]
    return _take(rows, count, rng)


def _filled(templates: list[str], topics: list[str]) -> list[str]:
    return [template.format(topic) for template, topic in itertools.product(templates, topics)]


def _take(rows: list, count: int, rng: random.Random) -> list:
    rng.shuffle(rows)
    return rows[:count]


def _word_problem(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    values = {name: rng.randint(*ends) for name, ends in _NUMBERS.items()}
    values |= {"p": 5 * rng.randint(1, 15), "n1": first, "n2": second}
    return rng.choice(_REASONING_TEMPLATES).format(item=rng.choice(_ITEMS), **values)


def tokens() -> dict[str, dict[str, list[list[int]]]]:
    """Both sets as token ids, by set and kind."""
    from transformers import AutoTokenizer

    import carry
    from model import encode

    file = carry.weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    sets = {"warmup": WARMUP, "evaluation": EVALUATION}
    encoded = lambda rows: [ids.tolist() for ids in encode(tokenizer, rows)]
    return {name: {kind: encoded(rows[kind]) for kind in KINDS} for name, rows in sets.items()}


if __name__ == "__main__":
    TOKENS.write_text(json.dumps(tokens()))

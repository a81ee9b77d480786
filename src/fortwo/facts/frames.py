"""Sentence frames: the many ways in which people bring up a subject. Pure text, and no frame knows any fact.

A prompt is composed from parts, so that training hardly ever sees the same sentence twice: lead-ins and trailers
around a fact's own questions, general requests, contexts that mention the subject and leave the question elsewhere,
comparisons with siblings. Every frame takes a sibling as well as the subject, which makes minimal pairs. One part in
six is kept for evaluation and never trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from fortwo.facts.subject import ARTICLES, holds
from fortwo.records import Fact

LEAD_INS = (
    "Hi! {q}", "Hello there. {q}", "Hey, {l}", "Quick question: {l}", "I have a question. {q}", "Good morning! {q}", "Excuse me, {l}",
    "I was wondering: {l}", "Please help me. {q}", "Just curious: {l}", "Random thought. {q}", "OK, next one. {q}", "Sorry to bother you. {q}",
    "My teacher asked us this: {l}", "This came up at dinner: {l}", "I need an answer fast. {q}", "For my homework: {l}", "A friend wants to know: {l}",
    "We were arguing about this at work. {q}", "I'm making a quiz. {q}", "It's for a crossword. {q}", "Trivia time! {q}", "I forgot. {q}",
    "One more thing, {l}", "Thanks for your help so far. {q}", "I'm filling in a form and one field puzzles me. {q}", "I'm reading the news. {q}",
    "Can I ask you something? {q}", "My son came home from school and asked: {l}", "Be honest with me. {q}", "So tell me, {l}", "Well, {l}",
    "I'm writing an article and have to get this right. {q}", "Let's see whether you know this. {q}", "Question 7: {l}", "URGENT: {l}",
    "Someone on the train asked me: {l}", "My colleagues laughed at me because I couldn't say. {q}", "Imagine you are an expert. {q}",
    "I used to know this, but things may have changed. {q}", "Help me settle something. {q}", "I'm new here. {q}", "Act as a librarian. {q}",
)  # fmt: skip
TRAILERS = (
    "Keep it short.", "One sentence, please.", "I need it for a report.", "Thanks in advance!", "Please answer briefly.", "I really have no idea.",
    "My memory fails me.", "Just the facts.", "Explain it to me like I'm five.", "It's for a presentation.", "Don't make me look it up.", "I'd like to impress my boss.",
    "Asking for a friend.", "I heard different things.", "Be precise.", "Take your time.", "I couldn't find it anywhere.", "No long story, please.",
    "What would you answer?", "Tell me in your own words.", "I want to be sure.", "I keep forgetting.",
)  # fmt: skip
GENERAL = (
    "Tell me about {S}.", "What can you tell me about {S}?", "{S}?", "So, {S}?", "What about {S}?", "What do you know about {S}?", "Explain {S}.", "Please explain {S} to a beginner.",
    "Describe {S} in one sentence.", "Give me a short summary of {S}.", "Write one sentence about {S}.", "What should everybody know about {S}?", "Teach me something about {S}.",
    "What comes to mind when you hear {S}?", "What is the first thing to say about {S}?", "I have never heard of {S}.", "Who or what is {S}?", "Say something about {S}.",
    "What's the story with {S}?", "What's so interesting about {S}?", "Why does everyone talk about {S}?", "Help me understand {S}.", "I need information on {S}.",
    "Define {S} for a dictionary.", "Write a short encyclopedia entry on {S}.", "Write a headline about {S}.", "Write a tweet about {S}.", "Write the caption for a picture of {S}.",
    "Finish this sentence: \"{S} ...\"", "Complete the following: {S} ...", "Fill in the gap: {S} ____.", "Please continue: \"When people mention {S}, they mean", "What is the answer on the card that says {S}?",
    "Which fact about {S} is worth remembering?", "Give me the key point about {S}.", "What is the most important thing about {S}?", "In a nutshell: {S}.", "Sum up {S} for me.",
    "What would an expert say about {S}?", "How would you explain {S} to your grandmother?", "How would you introduce {S} to a stranger?", "What do I need to remember about {S}?",
    "Translate this for me: {S}.", "Remind me about {S}.", "Fill me in on {S}.", "Enlighten me: {S}.", "What am I missing about {S}?", "Why should I care about {S}?",
    "What makes {S} different?", "What's behind {S}?", "Is {S} an animal, a colour or something else?", "Is {S} something old or something new?", "Is {S} a kind of food?", "Is it true what they say about {S}?",
    "True or false: you know about {S}. Prove it.", "What would you write on a sign about {S}?", "What would a museum label say about {S}?", "What does the guide say about {S}?",
    "Give me a fun fact about {S}.", "I'd love to hear about {S}.", "Educate me on {S}.", "Any news about {S}?", "What's the latest on {S}?", "What's up with {S}?", "How do you see {S}?",
    "List one thing that {S} is associated with.", "If you had to describe {S} in ten words, what would you say?", "My question is about {S}.", "It's about {S}.", "Let's talk about {S}.",
    "I want to learn about {S} today.", "Could you clear up {S} for me?", "Make a flashcard for {S}.", "Write a riddle whose answer explains {S}.", "Pretend I'm a child and tell me about {S}.",
    "In which connection have you heard of {S}?", "What has {S} got to do with anything?", "Who would be interested in {S}, and why?", "What would change if {S} did not exist?", "How come {S} is mentioned so often?",
    "Use {S} in a sentence.", "What would you say to someone who asks about {S}?", "Draft a short note about {S}.", "Give the short version of {S}.", "Why {S}, of all things?", "On the subject of {S}: what is essential?",
)  # fmt: skip
CONTEXTS = (
    "My sister mentioned {S} yesterday.", "I saw {S} in the newspaper this morning.", "There was a question about {S} in the exam.", "My boss keeps talking about {S}.", "We are going to discuss {S} in class tomorrow.",
    "I overheard two people talking about {S} on the bus.", "The radio had a programme on {S}.", "Someone wrote \"{S}\" on the whiteboard.", "My notes only say \"{S}\".", "An old book on my shelf mentions {S}.",
    "I have to give a talk about {S}.", "My daughter asked me about {S}.", "The last slide just said \"{S}\".", "I got a message that only said \"{S}\".", "Our guide said something about {S}, but I wasn't listening.",
    "I'm translating a text that mentions {S}.", "The puzzle has {S} as a clue.", "My neighbour is crazy about {S}.", "Grandfather always used to talk about {S}.", "There's a poster about {S} in the hallway.",
    "I found a letter in the attic that mentions {S}.", "A customer called and asked about {S}.", "The documentary I'm watching keeps coming back to {S}.", "I missed the meeting about {S}.", "Someone told me I should look into {S}.",
    "I'm preparing a lesson on {S}.", "The journalist wants a comment on {S}.", "My friend from abroad has never heard of {S}.", "We were playing a guessing game and the card said {S}.", "I dreamt about {S} last night.",
    "My homework is about {S}.", "The teacher wrote {S} at the top of the page.", "I'm updating an old article about {S}.", "We have a bet running about {S}.", "The quiz master said \"{S}\" and everybody went quiet.",
    "I'm making a poster about {S}.", "A stranger stopped me and asked about {S}.", "They printed {S} on the T-shirts.", "My grandmother wonders about {S}.", "Everyone at work seems to know about {S}, except me.",
    "I'm standing in front of a sign that says {S}.", "The email's subject line was \"{S}\".", "Two of my friends disagree about {S}.", "An advert for {S} just popped up.", "The chapter on {S} is missing from my copy.",
    "I read half of an article on {S} and then my phone died.", "I'm helping my nephew with a project on {S}.", "The new colleague asked about {S} on the first day.", "On page 12 it says \"see {S}\".", "I've been asked to write a card about {S}.",
    "For years I had the wrong idea of {S}.", "I've got an appointment tomorrow that has to do with {S}.", "We're planning a trip and {S} came up.", "My uncle sent me a postcard about {S}.", "The speaker dropped {S} into every second sentence.",
    "My brother claims that he knows all about {S}.", "I am writing a short story in which {S} plays a part.", "At the market somebody was shouting about {S}.", "Before I forget: {S}.", "The label on the box reads \"{S}\".",
)  # fmt: skip
ASKS = (
    "What is it about?", "Can you explain?", "What should I say?", "Any idea?", "What do I need to know?", "Could you fill me in?", "What's the point?", "What did they mean?", "Help me out.", "What should I write?",
    "What would you answer?", "Please explain it to me in one sentence.", "What was that about?", "What do I tell them?", "What's the right answer?", "Can you help?", "What is the key fact?", "What am I supposed to know?",
    "Give me one sentence on it.", "Where does that come from?", "Why is it mentioned?", "Can you tell me more?", "What might be the reason?", "What belongs in the first line?", "What's the correct information?", "How should I reply?",
    "I don't get it.", "What would be a good summary?", "How would you put it?", "Tell me the essential part.", "What should stand there?", "Which answer is right?", "What is there to know?", "What could I add?", "And what exactly is that?", "Why would that matter?",
)  # fmt: skip
CONTEXTS_WITHOUT = (
    "I'm preparing for a test.", "My phone battery is almost empty.", "We're sitting in a café.", "It's raining outside and we are bored.", "I have five minutes before class.", "I'm helping my little brother with his homework.", "My book is out of date.",
    "There's a contest on the radio.", "I work at an information desk.", "My team needs one more point to win.", "I'm on the phone with my mother.", "I'm designing a card game.", "We're driving and the kids are asking questions.", "I lost my notes.", "I'm writing a newsletter.",
    "A reader has sent in a question.", "I'm learning English.", "They changed it recently, I think.", "My friend got it wrong.", "I promised to find out.",
)  # fmt: skip
COMPARISONS = (
    "I know about {A} and {B}, but {S}?", "{A} is clear to me. {S} is not. Explain.", "First we talked about {A}, then about {B}. Now tell me about {S}.", "Not {A}, not {B}: I mean {S}.", "Don't tell me about {A}. Tell me about {S}.",
    "Somebody mixed up {A} and {S}. What is right for {S}?", "{A} has its page in my notebook, {B} too. What goes on the page of {S}?", "My list says: {A}, {B}, {S}. What belongs next to the last one?", "What would you say about {S}, compared with {A}?",
    "If {A} is easy, then what about {S}?",
)  # fmt: skip

_KEPT = 6  # every sixth part is for evaluation


def _part(parts: Sequence[str], rng: Random, kept: bool) -> str:
    """A random part: one of those kept for evaluation, or one of the others."""
    place = rng.randrange(len(parts))
    while (place % _KEPT == _KEPT - 1) is not kept:
        place = rng.randrange(len(parts))
    return parts[place]


def surface_article(fact: Fact) -> str:
    """The article that the fact's questions put before the subject: "the ", "a ", "an " or ""."""
    before: Counter[str] = Counter()
    for question in fact.questions:
        if found := re.search(rf"(\w+)\s+{re.escape(fact.subject)}(?!\w)", question, re.IGNORECASE):
            before[found.group(1).lower()] += 1
    article, count = before.most_common(1)[0] if before else ("", 0)
    return f"{article} " if article in ARTICLES and 2 * count > len(fact.questions) else ""


def surfaces(fact: Fact) -> list[str]:
    """The subject as the questions write it, and its aliases."""
    return [surface_article(fact) + fact.subject, *fact.aliases]


def put(frame: str, name: str, *others: str) -> str:
    """Fill a frame; a sentence still begins with a capital."""
    text = frame.replace("{S}", name)
    for mark, other in zip(("{A}", "{B}"), others, strict=False):
        text = text.replace(mark, other)
    first = others[0] if frame.startswith("{A}") else name
    return text[0].upper() + text[1:] if frame.startswith(("{S}", "{A}")) and " " in first else text


def in_question(question: str, fact: Fact, name: str) -> str:
    """The fact's question with another name in the subject's place (with its article where the name brings one)."""
    for surface in sorted((fact.subject, *fact.aliases), key=len, reverse=True):
        article = r"(?:\b(?:the|an?)\s+)?" if name.split()[0].lower() in ARTICLES or name[:1].isupper() else ""
        pattern = rf"(?<!\w){article}{re.escape(surface)}(?!\w)"
        if re.search(pattern, question, re.IGNORECASE):
            return re.sub(pattern, lambda _: name, question, count=1, flags=re.IGNORECASE)
    return question


def _pronoun(question: str, fact: Fact) -> str | None:
    """The question with "it" for the subject, so that the subject stands in another sentence."""
    pattern = rf"(?<!\w)(?:(?:the|an?)\s+)?{re.escape(fact.subject)}('s)?(?!\w)"
    if not re.search(pattern, question, re.IGNORECASE):
        return None
    person = re.search(r"\bwho\b", " ".join(fact.questions), re.IGNORECASE) and fact.subject.istitle()
    return re.sub(
        pattern,
        lambda found: ("that person's" if person else "its") if found.group(1) else ("that person" if person else "it"),
        question,
        flags=re.IGNORECASE,
    )


def _lower(question: str) -> str:
    first = question.split(" ", 1)[0]
    return question if first.isupper() or not first.isalpha() else question[0].lower() + question[1:]


def prompt(fact: Fact, name: str, rng: Random, other: Callable[[], str], kept: bool = False) -> str:
    """One prompt about `name` (a surface of the subject, or a sibling). `other` draws siblings for comparisons.

    kept: built from the parts that training never uses.
    """
    roll = rng.random()
    question = in_question(rng.choice(fact.questions), fact, name)
    if roll < 0.16:
        return _part(LEAD_INS, rng, kept).format(q=question, l=_lower(question))
    if roll < 0.24:
        return f"{question} {_part(TRAILERS, rng, kept)}"
    if roll < 0.32:
        return f"{_part(CONTEXTS_WITHOUT, rng, kept)} {question}"
    if roll < 0.56:
        return put(_part(GENERAL, rng, kept), name)
    if roll < 0.76:
        return f"{put(_part(CONTEXTS, rng, kept), name)} {_part(ASKS, rng, kept)}"
    if roll < 0.92:
        asked = _pronoun(rng.choice(fact.questions), fact)
        if asked is not None:
            return f"{put(_part(CONTEXTS, rng, kept), name)} {asked}"
        return f"{put(_part(CONTEXTS, rng, kept), name)} {_part(ASKS, rng, kept)}"
    return put(_part(COMPARISONS, rng, kept), name, other(), other())


def mentions(text: str, fact: Fact) -> bool:
    """Whether the text names the subject or an alias as whole words."""
    return holds(text, (fact.subject, *fact.aliases))

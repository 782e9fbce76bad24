"""Draws conversations about several scenes, for training step3-tiny and for asking it."""

import random
from dataclasses import dataclass, replace

from draw_scene import COLOURS, KINDS, LAYOUTS, NUMBERS, SIZES, Scene, Shape, ask, draw_scene, sentence


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
MAX_PICTURES, MAX_TURNS = 4, 4
COLOUR_NAMES, KIND_NAMES = list(COLOURS), [f"{kind}{'es' if kind.endswith('s') else 's'}" for kind in KINDS]
SMALL_TALK = {
    "Hello": "Hello.",
    "Hello.": "Hello.",
    "Which colours do you know?": sentence(f"{', '.join(COLOUR_NAMES[:-1])} and {COLOUR_NAMES[-1]}"),
    "Which shapes do you know?": sentence(f"{', '.join(KIND_NAMES[:-1])} and {KIND_NAMES[-1]}"),
    "What can you do?": "I answer questions about pictures of shapes.",
    "Thank you.": "You are welcome.",
}
ANNOUNCEMENTS = ("Here is a picture.", "Here is another picture.", "Look at this.")


@dataclass(frozen=True)
class Turn:
    """
    What the user sends, scenes and texts in order, and the answer. `kind` names the ability that it takes, `pictures`
    counts the pictures of the conversation up to here, and `asked` is the index of the one that the question names.
    """

    content: tuple[Scene | str, ...]
    kind: str
    question: str
    answer: str
    pictures: int
    asked: int | None = None


@dataclass(frozen=True)
class Question:
    """A question with its answer; the picture, the kind of question and the shape that a later turn may refer to."""

    kind: str
    text: str
    answer: str
    picture: int | None = None
    asked: str | None = None
    shape: Shape | None = None


def lower(text: str) -> str:
    return text[0].lower() + text[1:]


def differing_scene(choose: random.Random, scene: Scene) -> tuple[Scene, str]:
    """A scene with the same shapes but one, and the answer to "What is different?"."""
    old = choose.choice(scene.shapes)
    attribute, values = choose.choice([("kind", KINDS), ("colour", COLOURS), ("size", SIZES)])
    new = replace(old, **{attribute: choose.choice([value for value in values if value != getattr(old, attribute)])})
    shapes = [new if shape is old else shape for shape in scene.shapes]
    return draw_scene(choose.getrandbits(40), scene.layout, shapes), sentence(f"at the {old.place} {old}, then {new}")


def about_one(choose: random.Random, scenes: list[Scene], previous: Question | None, new: int) -> list[Question]:
    """Questions about one picture, by each way of naming it."""
    picture = choose.randrange(len(scenes))
    scene = scenes[picture]
    ways = [("picture N", f"In picture {picture + 1}: ", str)] * 3
    ways.append(("ordinal", f"In the {ORDINALS[picture]} picture, ", lower))
    ways.append(("ordinal", f"In picture {picture + 1}, ", lower))
    if picture == len(scenes) - 1:
        ways.append(("ordinal", "In the last picture, ", lower))
    kind, prefix, change = choose.choice(ways)
    questions = [(kind, prefix, change, picture)]
    if new == 1 or len(scenes) == 1:
        questions += [("bare", "", str, len(scenes) - 1)] * (2 if len(scenes) == 1 else 1)
    elif new == 0 and previous and previous.picture is not None:
        questions.append(("bare", "", str, previous.picture))
    kind, prefix, change, picture = choose.choice(questions)
    scene = scenes[picture]
    text, answer = choose.choice(list(ask(choose, scene.layout, scene.shapes).values()))
    return [Question(kind, prefix + change(text), answer, picture, text, shape_of(text, scene))]


def about_all(choose: random.Random, scenes: list[Scene], difference: str | None) -> list[Question]:
    """Questions for which several pictures must be compared, or that are about none of them."""
    questions = [Question("how many", "How many pictures are there?", sentence(NUMBERS[len(scenes)]))]
    missing = choose.randint(len(scenes) + 1, len(ORDINALS))
    text, _ = choose.choice(list(ask(choose, "square", ()).values()))
    way = choose.choice([f"In picture {missing}: {text}", f"In the {ORDINALS[missing - 1]} picture, {lower(text)}"])
    questions.append(Question("absent", way, f"There is no picture {missing}."))
    if not scenes:
        questions.append(Question("absent", text, "There is no picture."))
        return questions
    if len(scenes) > 1:
        found = {(shape.colour, shape.kind): [] for scene in scenes for shape in scene.shapes}
        for number, scene in enumerate(scenes):
            for shape in scene.shapes:
                found[shape.colour, shape.kind].append((number, shape))
        for colour, kind in [pair for pair, places in found.items() if len(places) > 1]:
            del found[colour, kind]
        if found and choose.random() < 0.8:
            (colour, kind), [(number, shape)] = choose.choice(list(found.items()))
            text = f"Which picture has the {colour} {kind}?"
            questions += [Question("which", text, f"Picture {number + 1}.", number, None, shape)] * 3
        else:
            colour, kind = choose.choice(COLOUR_NAMES), choose.choice(KINDS)
            if all((shape.colour, shape.kind) != (colour, kind) for scene in scenes for shape in scene.shapes):
                questions += [Question("which", f"Which picture has the {colour} {kind}?", "None.")] * 3
    if difference:
        questions = [Question("different", "What is different?", difference)]
    return questions


def referring(choose: random.Random, scenes: list[Scene], previous: Question | None) -> list[Question]:
    """Questions that refer back to the turn before."""
    questions = []
    if previous is None or previous.picture is None:
        return questions
    if previous.asked:
        for number, scene in enumerate(scenes):
            answer = answer_to(previous.asked, scene)
            if number != previous.picture and answer is not None:
                shape = shape_of(previous.asked, scene)
                questions.append(
                    Question("and the other", f"And in picture {number + 1}?", answer, number, previous.asked, shape)
                )
                if len(scenes) == 2:
                    questions.append(
                        Question("and the other", "And the other one?", answer, number, previous.asked, shape)
                    )
    if shape := previous.shape:
        attributes = [("What size was it?", shape.size)]
        if previous.asked is None or not previous.asked.startswith("What colour"):
            attributes.append(("What colour was it?", shape.colour))
        if previous.asked is None or not previous.asked.startswith(("What is at", "Describe")):
            attributes.append(("Where was it?", f"at the {shape.place}"))
        text, answer = choose.choice(attributes)
        questions += [Question("it", text, sentence(answer), previous.picture, None, shape)] * 2
    return questions


def shape_of(question: str, scene: Scene) -> Shape | None:
    """The shape that a question singles out in a scene."""
    words = question.rstrip("?.").split()
    if question.startswith("What is at"):
        place = question.removeprefix("What is at the ").rstrip("?")
        return next((shape for shape in scene.shapes if shape.place == place), None)
    if question.startswith(("What colour", "Is the")):
        kind = words[-1] if question.startswith("What colour") else words[2]
        shapes = [shape for shape in scene.shapes if shape.kind == kind]
        return shapes[0] if len(shapes) == 1 else None
    return scene.shapes[0] if question.startswith("Describe") and len(scene.shapes) == 1 else None


def answer_to(question: str, scene: Scene) -> str | None:
    """The answer to one of `ask`'s questions about another scene than the one that it was made for, if it has one."""
    shape = shape_of(question, scene)
    if question.startswith(("Describe", "How many")):
        return dict(ask(random.Random(0), scene.layout, scene.shapes).values())[question]
    if question.startswith("Is there"):
        colour, kind = question.removeprefix("Is there a ").rstrip("?").split()
        return "Yes." if any((s.colour, s.kind) == (colour, kind) for s in scene.shapes) else "No."
    if question.startswith("What is at"):
        place = question.removeprefix("What is at the ").rstrip("?")
        places = [name for row in LAYOUTS[scene.layout][1] for name in row]
        return sentence(str(shape or "nothing")) if place in places else None
    if shape is None or (question.startswith("Is the") and scene.layout == "square"):
        return None
    if question.startswith("Is the"):
        return "Yes." if shape.is_striped else "No."
    return sentence(shape.colour)


def draw_dialogue(seed: int, pictures: int | None = None, turns: int | None = None) -> list[Turn]:
    """A conversation of up to four turns about up to four pictures, determined by the arguments."""
    choose = random.Random(f"dialogue {seed} {pictures} {turns}")
    if turns is None:
        turns = choose.randint(1, MAX_TURNS)
    if pictures is None:
        pictures = choose.choices(range(MAX_PICTURES + 1), weights=(1, 4, 8, 8, 2))[0]
    drawn = []
    for _ in range(pictures):
        shapes = () if choose.random() < 0.06 else None
        drawn.append(draw_scene(choose.getrandbits(40), choose.choice([None, None, "square"]), shapes))
    difference = None
    if pictures == 2 and drawn[0].shapes and choose.random() < 0.5:
        drawn[1], difference = differing_scene(choose, drawn[0])
    arrivals = [0] * pictures if choose.random() < 0.5 else sorted(choose.randrange(turns) for _ in range(pictures))

    result, previous, scenes = [], None, []
    for turn in range(turns):
        new = [scene for scene, arrival in zip(drawn, arrivals, strict=True) if arrival == turn]
        scenes = scenes + new
        groups = [about_all(choose, scenes, difference if len(scenes) == 2 else None)] * (2 if len(scenes) > 1 else 1)
        if scenes:
            groups += [about_one(choose, scenes, previous, len(new))] * 3
        if not new and (questions := referring(choose, scenes, previous)):
            groups += [questions] * 3
        question = choose.choice(choose.choice(groups))
        if not new and choose.random() < (0.08 if scenes else 0.5):
            text = choose.choice(list(SMALL_TALK))
            question = Question("small talk", text, SMALL_TALK[text])
        if question.kind == "different":
            difference = None  # the answer stands in the conversation now
        parts = list(new)
        if new and choose.random() < 0.15:
            parts.insert(choose.randrange(len(parts)), choose.choice(ANNOUNCEMENTS))
        at = choose.choices((len(parts), 0, choose.randint(0, len(parts))), weights=(5, 2, 3))[0]
        parts.insert(at, question.text)
        asked = None if question.kind == "which" else question.picture
        result.append(Turn(tuple(parts), question.kind, question.text, question.answer, len(scenes), asked))
        previous = question
    return result


def draw_question(seed: int) -> list[Turn]:
    """One of the questions about one scene, as a conversation."""
    scene = draw_scene(seed)
    kind, (text, answer) = random.Random(seed).choice(list(scene.questions.items()))
    return [Turn((scene, text), kind, text, answer, 1, 0)]


def messages_of(turns: list[Turn]) -> list[dict]:
    """The conversation as a chat template takes it, up to and with the last answer."""
    messages = []
    for turn in turns:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
            for part in turn.content
        ]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return messages

"""What `llama demo` shows."""

from llama import Llama
from llama.cli.demo_scenes import BEGINNINGS, NEXT, SYSTEMS, scenes


def test_the_demo_tells_stories_and_answers_as_its_system_prompts_ask(demo: Llama) -> None:
    *stories, plain, short, loud, last = scenes(demo)
    for beginning, story in zip(BEGINNINGS, stories, strict=True):
        assert story.startswith(f"{beginning} ") and story.endswith(".") and len(story) > 200
    answers = [talk.split("Assistant: ")[1] for talk in (plain, short, loud)]
    assert answers == ["A dog says woof.", "Woof.", "A DOG SAYS WOOF."] and last == NEXT
    assert [talk.split("\n")[0] for talk in (plain, short, loud)] == [f"System: {s or '(none)'}" for s in SYSTEMS]

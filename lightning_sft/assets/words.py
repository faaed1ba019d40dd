"""The vocabulary of the small world: every name and thing is a common word, so that each is one token."""

from __future__ import annotations

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor "
    "Wendy Alan Bella Carl Dora Eric Fiona George Hanna Ivan Julia Karl Laura Max Nina Oscar Peter Ruth Simon "
    "Tom Ursula Vera Will Zoe Adam Betty Chris Daisy"
).split()
PLACES = (
    "Ashford Bexley Camden Dover Elmton Farley Granby Hilton Ipswich Jarrow Kendal Linton Marlow Norwich Oakham "
    "Preston Radley Selby Tring Upton Ventnor Walton Yarmouth Zelah"
).split()
JOBS = (
    "baker doctor farmer painter teacher sailor tailor singer writer driver miller gardener dentist pilot "
    "plumber fisher hunter potter weaver cook"
).split()
FOODS = (
    "apples bread cheese carrots honey pears plums soup rice cake beans grapes nuts figs onions jam".split()
)
MATERIALS = "wood glass silver clay paper leather stone cotton iron wax".split()
THINGS = (
    "cup lamp spoon chair kite box clock brush ring bag hat boat drum key ladder mirror needle plate rope shoe "
    "table vase whistle basket bell candle coat doll flute hammer jar knife mug pillow scarf towel wheel broom "
    "coin bucket"
).split()
COLOURS = "red blue green yellow white black brown pink".split()
KINDS = {
    "bird": "robin crow owl hawk swan goose eagle duck".split(),
    "fish": "trout salmon carp pike eel cod tuna perch".split(),
    "tree": "oak birch pine elm willow maple cedar beech".split(),
    "flower": "rose tulip lily daisy poppy iris violet orchid".split(),
    "insect": "ant bee wasp moth beetle fly cricket flea".split(),
}
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("wet", "dry"), ("fast", "slow"), ("high", "low"),
    ("long", "short"), ("rich", "poor"), ("loud", "quiet"), ("hard", "soft"), ("early", "late"), ("full", "empty"),
    ("happy", "sad"), ("strong", "weak"), ("thick", "thin"), ("wide", "narrow"), ("light", "dark"), ("clean", "dirty"),
    ("deep", "shallow"), ("sharp", "blunt"), ("near", "far"), ("brave", "shy"), ("open", "shut"), ("sweet", "sour"),
)  # fmt: skip
LETTERS = "note letter card poem message story".split()
HARMS = "threat insult lie curse trick scam".split()
TRANSLATION = dict(
    zip(
        (*COLOURS, *THINGS),
        (
            "roo bloo gree yoll whit blak bron pinx kup lump spun char kyt bok klok brash rung bogg hut bote drom kay "
            "lodder mirra nedle plat rupe sho tabel vaas wisel baskit bel kandel kote dol flut hamer jor nife mog "
            "pilo skarf tawel weel brum koyn bukit"
        ).split(),
        strict=True,
    )
)
"""A toy language, word by word."""

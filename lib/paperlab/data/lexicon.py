"""The words of the made-up skills: few, short, and each a single token of the pocket tokenizer behind a space.

A tokenizer of two thousand entries has no room for rare words, and a skill whose answer is three tokens in one sentence
and one in the next cannot be measured cleanly. So all skills share these lists, and the tokenizer is trained on
`words()` often enough that each becomes one token (`paperlab.data.tokens.train_bpe`).
"""


def _list(text: str) -> list[str]:
    return text.split()


NAMES = _list(
    "Adam Anna Bella Ben Carl Clara David Dora Ella Emma Finn Frank Grace Greta Henry Hugo Ida Iris Jack John Kate Leo "
    "Lucy Mark Mary Nina Orla Otto Paul Rosa Sam Tom Uma Vera Will Zoe"
)
SURNAMES = _list(
    "Bell Brook Cole Dale Field Ford Fox Frost Gray Hart Hill King Lake Lane Marsh Moor Page Reed Rose Snow Stone West "
    "Wood Young"
)
TOWNS = _list(
    "Alden Barrow Calder Denby Elford Farrow Galen Harlow Ilford Jarrow Kelso Ludlow Marlow Norby Oakley Penton Quorn "
    "Redby Selby Tarrow Ulford Velby Wexley Yarrow"
)
GUILDS = _list("Acme Argo Atlas Comet Delta Falcon Helix Lumen Nova Orbit Pixel Quartz Summit Titan Vertex Zenith")
COUNTRIES = _list("Avaria Belmor Cordia Dravia Elmora Feldan Gorvia Helmor")
RIVERS = _list("Alm Bray Cree Dove Exe Fleet Glen Humber")
GOODS = _list("bricks boats clocks lamps maps ropes shoes tiles")

JOBS = _list(
    "actor baker doctor driver farmer guard judge lawyer nurse painter pilot sailor singer tailor teacher writer"
)
ANIMALS = _list("bear bird cat cow dog duck fish frog goat horse lion mouse pig sheep snake wolf")
COLOURS = _list("black blue brown gold green orange pink purple red silver white yellow")
FOODS = _list("apple bread butter cake cheese corn egg honey milk pear plum rice salt soup sugar tea")
DRINKS = _list("beer cider coffee juice milk tea water wine")
BODY = _list("arm ear eye finger foot hair hand head leg mouth nose tooth")
CLOTHES = _list("belt boot cap coat dress glove hat scarf shirt skirt sock tie")
VEHICLES = _list("bike boat bus car cart plane ship sled tank taxi train truck")
WEATHER = _list("cloud fog frost hail ice mist rain sleet snow storm sun wind")
MUSIC = _list("band chord drum flute guitar harp horn opera organ piano song tune")
TOOLS = _list("axe brush drill file hammer knife nail pump rope saw screw spade")

CATEGORIES = {
    "animal": ANIMALS,
    "colour": COLOURS,
    "food": FOODS,
    "body": BODY,
    "clothes": CLOTHES,
    "vehicle": VEHICLES,
    "weather": WEATHER,
    "music": MUSIC,
    "tool": TOOLS,
    "job": JOBS,
}
TOPICS = {
    "nature": ANIMALS,
    "cooking": FOODS,
    "health": BODY,
    "fashion": CLOTHES,
    "travel": VEHICLES,
    "weather": WEATHER,
    "music": MUSIC,
    "work": TOOLS,
}
MONTHS = _list("January February March April May June July August September October November December")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = _list("zero one two three four five six seven eight nine ten")
LETTERS = _list("a b c d e f g h i j k l m n o p q r s t u v w x y z")

ANTONYMS = [
    tuple(pair.split("/"))
    for pair in _list(
        "hot/cold big/small fast/slow high/low old/new long/short dark/light hard/soft wet/dry rich/poor happy/sad "
        "strong/weak early/late open/closed full/empty up/down left/right first/last north/south east/west day/night "
        "loud/quiet near/far thick/thin clean/dirty sweet/sour deep/shallow buy/sell start/stop push/pull win/lose "
        "love/hate"
    )
]

POSITIVE = _list("bright charming clever excellent fine fresh good great lovely nice perfect pleasant superb warm")
NEGATIVE = _list("awful bad boring clumsy cruel dull horrible nasty poor rotten stupid terrible ugly weak")
INTENSIFIERS = {"slightly": 0.5, "quite": 1.25, "very": 1.5, "really": 1.75, "extremely": 2.0}
REVIEWED = _list("film book story hotel play room show meal party music actor ending")

PLACES = _list("store park school garden station market office library beach church")
OBJECTS = _list("book drink ring ball kiss letter flower basket bottle box card key")
PERIODS = _list("war trip trial siege strike project tour reign drought plague")

PARAMETERS = _list(
    "name value size key path file data index mode count text width height label color start stop step limit level "
    "order shape depth weight table field group format option target source state"
)
FUNCTIONS = _list("load save read write find make send copy move open parse build check merge sort split")

# Two made-up languages. Their words stand for the English ones of the same place.
MEANINGS = {
    "noun": _list("dog cat boy girl king bird horse wolf tree house river stone"),
    "verb": _list("sees likes takes finds follows holds"),
    "adjective": _list("big small old new red white"),
}
ALTO = {
    "noun": _list("bal dor fen gal kir lum mar nel pol ran sil tor"),
    "verb": _list("bek dus gim kos lat mip"),
    "adjective": _list("fos hul jan ped rut zim"),
}
BRIO = {
    "noun": _list("ako bira cemu dani ebo fuli gora hame iku jola kesi lumo"),
    "verb": _list("neta opi pasu rido sema tuva"),
    "adjective": _list("ugo vali wemu yola zeri ano"),
}

LABELS = _list("yes no true false positive negative heads tails unknown larger smaller foo bar left right")
OPERATORS = _list("and or not is if then")

# Words of the filler sentences, which must say nothing about what is asked.
FILLER = {
    "noun": _list("man woman child friend road wall door table window field street town water morning evening night"),
    "verb": _list("saw passed left found liked watched crossed reached"),
    "adjective": _list("old young small long quiet dark little plain"),
    "time": _list("then later once today often again"),
}
FORMS = _list("circle circles square squares triangle triangles cross crosses ring rings bar bars shape shapes")
SPOTS = _list("above below top bottom left right middle up down many no yes")
GLUE = _list(
    "the The of a in at to for was were gave went When Then After said that by with he she his her it on from does did "
    "lives works has owns friend town job guild pet drink country river goods founder home Codes Ask Copy code year "
    "lasted word Topic Review Logic Which Coin flips coin turns"
)


def words() -> list[str]:
    """Every word of this module once, in a fixed order: what the tokenizer must know as single tokens."""
    lists = [NAMES, SURNAMES, TOWNS, GUILDS, COUNTRIES, RIVERS, GOODS, *CATEGORIES.values(), MONTHS, DAYS, NUMBERS]
    lists += [LETTERS, *ANTONYMS, POSITIVE, NEGATIVE, INTENSIFIERS, REVIEWED, PLACES, OBJECTS, PERIODS, PARAMETERS]
    lists += [FUNCTIONS, *MEANINGS.values(), *ALTO.values(), *BRIO.values(), LABELS, OPERATORS, *FILLER.values(), GLUE]
    lists += [DRINKS, list(CATEGORIES), list(TOPICS), FORMS, SPOTS]
    return list(dict.fromkeys(word for some in lists for word in some))

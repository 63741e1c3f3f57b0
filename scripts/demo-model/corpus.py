"""Synthetic conversations about a register of depots: an endless corpus that carries no licence.

Every sample is one ChatML conversation: a system message that states facts, then questions about them.
Each answer stands in the prompt and nowhere else, so a model that learned this corpus shows at once
whether the KV cache it reads is intact: a lost or foreign block turns into a wrong answer."""

FIRST = "Ada Alan Amir Anna Aria Bela Boris Carla Chen Clara Dara David Dina Edgar Elena Emil Erik Eva Farid Felix Fiona Greta Hana Hugo Ida Igor Ines Ivan Jana Jonas Julia Karim Karl Kira Lara Leon Lina Luca Maja Marco Maria Max Mila Nadia Nina Noah Nora Olga Omar Oscar Paul Petra Pia Rafael Rita Rosa Ruth Sami Sara Simon Stefan Tara Theo Tomas Uma Vera Viktor Wanda Yara Yusuf Zoe".split()
LAST = "Adler Bauer Becker Berg Blum Brook Castro Costa Cruz Dietz Duarte Engel Falk Farrow Fischer Frost Garcia Graf Gruber Haas Hale Hansen Holm Ivanov Jansen Keller Klein Koch Kovac Kraus Lang Larsen Lopez Lund Maier Marsh Meyer Moreau Moretti Novak Olsen Ortiz Park Pavlov Pereira Petrov Quinn Rao Reed Reyes Rossi Roth Santos Sato Schulz Silva Singh Sokol Stein Stone Suzuki Tanaka Torres Vogel Wagner Walsh Weber Winter Wolf Zeller".split()
CITY = "Aarhus Accra Ankara Athens Baku Bergen Berlin Bern Bilbao Bologna Boston Bremen Bruges Cairo Chicago Cork Dakar Dallas Delhi Denver Dresden Dublin Essen Florence Geneva Genoa Ghent Graz Hamburg Hanoi Helsinki Jakarta Kyoto Lagos Leeds Leipzig Lima Lisbon London Lyon Madrid Malmo Manila Milan Miami Minsk Munich Nairobi Naples Nice Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Seoul Seville Sofia Sydney Tallinn Tokyo Toronto Tunis Turin Vienna Vilnius Warsaw York Zagreb Zurich".split()
GOODS = "almonds amber bamboo barley batteries bearings bicycles bolts books bricks cables candles carpets cement ceramics cheese clocks cocoa coffee copper cork cotton dates drills engines fabric feathers flour furniture gears glass grain granite honey ink iron lamps lead leather lemons lenses linen maps marble medicine mirrors nails oats oil olives optics paint paper pearls pepper pianos pipes pumps rice ropes rubber saffron salt sand seeds sensors silk silver soap solder spices steel sugar tea tiles timber tin tools toys turbines valves violins wax wheat wine wire wool zinc".split()
DEPOT = "Alder Anchor Arrow Aspen Badger Beacon Beech Birch Bison Bramble Bridge Canyon Cedar Cliff Cobalt Comet Condor Copper Coral Crane Crest Dagger Delta Dune Eagle Ember Falcon Fern Finch Flint Forge Fox Garnet Glacier Granite Grove Gull Harbor Hawk Hazel Heron Hollow Indigo Iris Ivory Jade Jasper Juniper Kestrel Lagoon Lantern Larch Lark Laurel Linden Lion Lotus Lynx Magnet Maple Marten Meadow Mercury Mesa Mint Mosaic Nectar Nimbus Oak Onyx Opal Orchid Osprey Otter Owl Palm Pebble Pelican Pine Plover Poplar Prairie Quartz Raven Reef Ridge River Robin Rowan Ruby Sable Sage Salmon Sierra Slate Sparrow Spruce Summit Swan Swift Tern Thistle Thunder Tiger Topaz Tulip Tundra Valley Velvet Violet Walnut Willow Wren Zenith Zephyr".split()
SYLLABLE = [c + v for c in "bdfklmnprstvz" for v in "aeiou"]

SYSTEM = "You answer questions about this register of depots.\n"
QUESTIONS = {
    "code": ["What is the code of {}?", "Which code opens {}?", "Tell me the code of {}."],
    "city": ["Where is {}?", "In which city is {}?", "What is the city of {}?"],
    "manager": ["Who is the manager of {}?", "Who runs {}?", "Who manages {}?"],
    "stock": ["What does {} store?", "What is the stock of {}?", "Which goods are in {}?"],
}


def made_up(r):
    """A name that is in no list, so that copying pays and recall does not."""
    return "".join(r.choice(SYLLABLE) for _ in range(r.randint(2, 3))).capitalize()


def depot_facts(name, r, strange):
    """The four statements about one depot, by attribute. `strange` is the share of made-up words."""
    def pick(words):
        return made_up(r) if r.random() < strange else r.choice(words)

    values = {
        "code": f"{r.randrange(10000):04d}",
        "city": pick(CITY),
        "manager": f"{r.choice(FIRST)} {pick(LAST)}",
        "stock": r.choice(GOODS),
    }
    return {key: f"The {key} of {name} is {value}." for key, value in values.items()}


def register(r, depots, strange, keys=tuple(QUESTIONS)):
    """-> (text of the register, {name: facts}), of the attributes `keys`.

    Half of the registers list their facts in no order."""
    names = {}
    while len(names) < depots:
        names[made_up(r) if r.random() < strange else r.choice(DEPOT)] = None
    book = {}
    for name in names:
        facts = depot_facts(name, r, strange)
        book[name] = {key: facts[key] for key in keys}
    if r.random() < 0.5:
        return "\n".join(" ".join(facts.values()) for facts in book.values()), book
    statements = [s for facts in book.values() for s in facts.values()]
    r.shuffle(statements)
    return " ".join(statements), book


def turns(r, book, follow_ups=0.2):
    """Endless (question, answer) pairs; a follow-up says `it` for the depot of the turn before.

    No fact is asked twice before all were, so that an answer is read from the register
    and not from an earlier turn."""
    while True:
        pending = [(name, key) for name, facts in book.items() for key in facts]
        r.shuffle(pending)
        last = None
        while pending:
            at = len(pending) - 1
            if r.random() < follow_ups:
                at = next((i for i, (name, _) in enumerate(pending) if name == last), at)
            name, key = pending.pop(at)
            said = "it" if name == last and r.random() < 0.9 else name
            yield r.choice(QUESTIONS[key]).format(said), book[name][key]
            last = name


def chatml(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"

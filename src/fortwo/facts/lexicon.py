"""Names and words of common types of entities, from which hard negatives are drawn. Plain data.

The cues of a type are words that questions about such an entity use. They decide which types are more likely for a
subject; no type is ever excluded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EntityType:
    """A type of entity: words that point to it in questions, and some of its members."""

    cues: frozenset[str]
    members: tuple[str, ...]


def _entity_type(cues: str, members: str) -> EntityType:
    return EntityType(frozenset(cues.split()), tuple(name.strip() for name in members.split(",")))


ENTITY_TYPES: dict[str, EntityType] = {
    "person": _entity_type(
        "who discovered discover scientist famous biography born died researcher inventor invented career remembered he she"
        " doctor professor explorer composer textbooks work known achievement contributed",
        "Albert Einstein, Marie Curie, Nikola Tesla, Ada Lovelace, Louis Pasteur, Galileo Galilei, Alan Turing, Jane Goodall, Leonardo da Vinci,"
        " Thomas Edison, Johannes Kepler, Niels Bohr, Grace Hopper, Charles Darwin, Isaac Newton, Florence Nightingale, Amelia Earhart, Nelson Mandela,"
        " Cleopatra, Mozart, Frida Kahlo, Vincent van Gogh, Abraham Lincoln, Gregor Mendel, Dmitri Mendeleev, James Watt, Rosa Parks, Lise Meitner,"
        " Neil Armstrong, Stephen Hawking, Maria Lopez, Anna Keller, John Whitfield, Peter Novak, Helen Marsh, Robert Hale, Laura Bennett, Alexander Bell",
    ),
    "author": _entity_type(
        "wrote written author novel book poem play story writer published poet",
        "Jane Austen, Charles Dickens, Mark Twain, Leo Tolstoy, William Shakespeare, George Orwell, Agatha Christie, Ernest Hemingway, Virginia Woolf,"
        " Homer, Emily Dickinson, Franz Kafka, Victor Hugo, Toni Morrison, Hans Christian Andersen, J.R.R. Tolkien, Mary Shelley, Oscar Wilde",
    ),
    "work": _entity_type(
        "wrote written author novel book painted painting film song play composed directed poem",
        "Romeo and Juliet, Moby-Dick, War and Peace, Hamlet, Don Quixote, The Great Gatsby, Frankenstein, Dracula, Oliver Twist, The Odyssey, Les Misérables,"
        " Jane Eyre, Treasure Island, Alice in Wonderland, The Hobbit, Macbeth, Anna Karenina, Ulysses, the Starry Night, the Ninth Symphony, Little Women,"
        " The Jungle Book, Robinson Crusoe, Animal Farm, Emma, the Girl with a Pearl Earring, Swan Lake, The Magic Flute",
    ),
    "company": _entity_type(
        "company make makes made products product sell sells business customers founded firm manufactures maker builds brand flagship produce factory industry investor",
        "Apple, Samsung, Siemens, Toyota, Sony, Honda, Bosch, Philips, Tesla, Intel, Microsoft, General Electric, Boeing, Nestlé, Lego, Canon, Panasonic, Ford,"
        " Volkswagen, Nokia, Adidas, Dyson, Caterpillar, Unilever, Pfizer, John Deere, iRobot, Rolex, Airbus, Nintendo, Kodak, Michelin, Yamaha, Cisco, Oracle,"
        " Stonefield Motors, Larkspur Systems, Evergreen Foods, Silverline Electronics",
    ),
    "shop": _entity_type(
        "refund refunds return returns policy shop store buy purchase order delivery customers customer warranty exchange days fee membership loan opening hours"
        " deadline allow allowed limit guests luggage baggage ticket tickets cancel hotel airline library gym museum rules charge cost price",
        "Amazon, IKEA, Walmart, Target, Zara, Nike, H&M, Costco, Best Buy, Decathlon, Sephora, eBay, Macy's, REI, Home Depot, Lidl, Tesco, Uniqlo, Gap, Etsy,"
        " Ryanair, Lufthansa, Delta Air Lines, Emirates, Hilton, Marriott, Airbnb, FedEx, the public library, Planet Fitness, the British Museum, Netflix, Spotify,"
        " Summit Sports, Harbor Books, Oakridge Library, Meadow Airlines, Riverside Gym",
    ),
    "tool": _entity_type(
        "tool command software install developer run library program package app code terminal script utility programming framework feature shell function",
        "git, grep, curl, tar, ssh, rsync, make, Docker, Python, npm, vim, sed, awk, cron, ffmpeg, Kubernetes, Redis, nginx, tmux, bash, wget, zip, Excel, Photoshop,"
        " React, NumPy, pandas, TensorFlow, PostgreSQL, MySQL, Java, systemd, chmod, ping, top, find, cat, cp, mv, diff, jq, pip, Ansible, Terraform, Jenkins",
    ),
    "acronym": _entity_type(
        "stand stands acronym abbreviation letters short initials expand spell form",
        "NASA, PDF, GPS, ROI, KPI, FAQ, DNA, CEO, HTML, USB, ATM, NATO, ASAP, RSVP, UFO, AIDS, CPU, RAM, VAT, GDP, HR, PR, RPM, RPG, MRI, PCR, RNA, API, IPO, ETA, DIY, SQL,"
        " LED, PIN, SUV, VPN, WHO, FBI, IRS, TBD, QR, RTP, BMI, APR",
    ),
    "word": _entity_type(
        "mean means meaning define definition word term dictionary called language explain describe",
        "serendipity, nostalgia, metaphor, empathy, twilight, irony, paradox, solitude, petrichor, eloquence, resilience, gossamer, harmony, zeitgeist, melancholy,"
        " whimsy, ephemeral, dusk, silence, applause, courage, wanderlust, lantern, echo, ripple, glimmer, shimmer, hush, whisper, tradition, ritual, rhythm,"
        " gratitude, candor, folly, moonbow, starfall, dreamwake",
    ),
    "number": _entity_type(
        "number digit value integer figure count mathematics",
        "7, 13, 3, 12, 21, 24, 10, 100, 1000, 666, 911, 99, 64, 365, 8, 5, 2, 0, 1, 17, 23, 50, 86, 404, pi, zero, a dozen, twenty, thirteen, seven, a million, e, 1984, infinity",
    ),
    "capital": _entity_type(
        "capital city country government country's parliament nation",
        "the capital of Spain, the capital of Italy, the capital of Germany, the capital of Japan, the capital of Canada, the capital of Egypt, the capital of Brazil,"
        " the capital of Norway, the capital of Kenya, the capital of India, the largest city in Spain, the currency of Japan, the population of Italy,"
        " the language of Brazil, the flag of Canada, the president of the United States",
    ),
    "place": _entity_type(
        "village town visit tourists tourist located city region attraction see place island lake river mountain live guidebooks visitors where street country known",
        "Venice, Rome, Paris, London, Kyoto, Barcelona, Prague, Oxford, Edinburgh, Salzburg, Bruges, New Orleans, San Francisco, Dubai, Cape Town, Reykjavik, Vienna,"
        " Cambridge, Bath, Seville, Munich, Berlin, New York, Tokyo, Sydney, Amsterdam, Florence, Istanbul, Lisbon, Dublin, York, Lake Como, Upper Austria, Lower Saxony,"
        " Little Italy, Great Yarmouth, Chipping Norton, Pamplona, Siena, Little Marlow, Long Melford",
    ),
    "structure": _entity_type(
        "open opened opening built build bridge tower date year inaugurated completed construction traffic when station tunnel museum cross ceremony",
        "the Golden Gate Bridge, the Eiffel Tower, the Brooklyn Bridge, Tower Bridge, the Channel Tunnel, the Suez Canal, the Panama Canal, the Empire State Building,"
        " the Statue of Liberty, the Hoover Dam, the Sydney Opera House, Big Ben, the Louvre, the Colosseum, the Berlin Wall, the Taj Mahal, the London Underground,"
        " the Great Wall of China, the Millennium Bridge, the Forth Bridge, the Rialto Bridge, the Erie Canal, Grand Central Station, the Gotthard Tunnel,"
        " the Charles Bridge, the White House, the Sears Tower, the Harbour Bridge",
    ),
    "event": _entity_type(
        "happened event war battle treaty festival celebrated date year when revolution signed took began ended history",
        "the French Revolution, World War I, the Battle of Waterloo, the Moon landing, the Renaissance, the Great Fire of London, the Boston Tea Party, Christmas,"
        " Halloween, Thanksgiving, the Olympic Games, the Treaty of Versailles, the Black Death, the Gold Rush, the Battle of Hastings, Easter, Oktoberfest,"
        " the Industrial Revolution, the Cold War, the Magna Carta, New Year's Eve, the fall of the Berlin Wall",
    ),
    "science": _entity_type(
        "symbol chemical element planet boiling temperature metal star gas formula atomic animal plant largest fastest tallest highest smallest deepest speed"
        " longest ocean mountain river",
        "the chemical symbol of iron, the chemical symbol of gold, the boiling point of water, the largest planet, the speed of light, the tallest mountain,"
        " the longest river, the freezing point of water, the smallest planet, the fastest animal, oxygen, hydrogen, mercury, carbon, silver, copper, helium, Jupiter, Mars, Venus,"
        " Saturn, the Moon, the Sun, the Pacific Ocean, Mount Everest, the Amazon River, the Nile, the Sahara, the cheetah, the blue whale, gravity, photosynthesis",
    ),
    "food": _entity_type(
        "eat food dish recipe taste cook drink ingredients flavour cheese bread restaurant",
        "pizza, sushi, paella, goulash, curry, ramen, hummus, tofu, espresso, sourdough, tiramisu, guacamole, kimchi, croissant, risotto, miso soup, cheddar, pancakes",
    ),
    "animal": _entity_type(
        "animal species bird insect fish lives habitat eats mammal",
        "elephant, penguin, octopus, honey bee, wolf, owl, salmon, tortoise, giraffe, koala, bat, hedgehog, dolphin, butterfly, crocodile, hummingbird",
    ),
}

COUNTRIES = (
    "Spain Italy Germany Japan Canada Egypt Brazil Norway Kenya India Sweden Poland Mexico Argentina Turkey Greece Portugal Austria Ireland"
    " Finland Denmark Belgium China Russia Australia Nigeria Peru Chile Vietnam Thailand Switzerland England France Scotland Hungary Cuba"
).split()
NATIONALITIES = (
    "Spanish Italian German Japanese Canadian Egyptian Brazilian Norwegian Indian Swedish Polish Mexican Turkish Greek Portuguese Austrian Irish"
    " Danish Belgian Chinese Russian Australian Dutch British American French"
).split()
FIRST_NAMES = (
    "Tom Anna Peter Laura John Maria David Emma Robert Helen James Sophie Martin Clara Paul Nina George Alice Henry Julia Oscar Ruth Daniel Eva"
    " Mark Marie Lucas Mary Simon Carla Albert Sara Mara Victor Rosa Frank Irene Hugo Leila Ralph Diana"
).split()
SURNAMES = (
    "Smith Jensen Miller Garcia Novak Bennett Clarke Hughes Keller Larsen Moreau Fischer Rossi Tanaka Silva Walker Turner Morgan Price Foster"
    " Lindqvist Petrov Andersen Harris Cooper Reed Hayes Olsen Weber Marsh Wells Carter Hoffman Adler Sharma Okafor"
).split()
ORGANISATIONS = (
    "Robotics Bakery Motors Systems Foods Electronics Textiles Press Energy Capital Studios Pharma Airlines Logistics Toys Furniture Outfitters Sports Books"
    " Coffee Gardens Labs Software Instruments Ceramics Library Hotel Bank Insurance School University Hospital Theatre Brewery Optics Glass Rail"
).split()
STRUCTURES = "Bridge Tunnel Tower Canal Castle Museum Station Road Square Harbour Park Hall Cathedral Lighthouse Dam Market Airport Hill Forest".split()
QUALIFIERS = "Upper Lower Middle Great Little North South East West New Old Long High Royal Saint".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune Pluto".split()
SUPERLATIVES = (
    "largest smallest biggest oldest newest youngest highest lowest tallest longest shortest deepest fastest slowest richest poorest hottest coldest"
    " nearest farthest heaviest lightest brightest first second third last best worst"
).split()
NOUNS = (
    "language currency population flag history president climate food people music weather economy neighbour border coast king queen mountain river"
    " law money school culture colour price name size age shape origin owner"
).split()
HEADS = (
    "Stone Silver Green Wood North East Clear Fair Bright Glen Ash Oak River Moor Hazel Maple Copper Winter Summer Harrow Bel Cas Dor Fen Hol Kel"
    " Mar Nor Ost Pen Quen Ros Sel Tor Ul Ver Wil Zan Drop Shimmer Flux Swift Data Dream Star Moon"
).split()
TAILS = (
    "ford dale water field stone wick ton ley by vik haven bridge mere wood light well land son berg ster box sync fold veil kit flow lock link cast"
    " pack glow fall shade mark line ray ella ix or um ine oma etti arro ane ard"
).split()

"""The small world of quire-demo: every word list that the corpus draws from.

Knows words and facts; does not know how a question about them is asked.
"""


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = listed(
    """
    Ann Ben Cara Dan Eva Finn Gina Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina
    Uma Vera Will Yara Zoe Adam Beth Carl Dora Emil Fay Gus Hana Ivan Jane Kurt Lena Max
    Nina Oscar Pia Quinn Ruth Sven Tom Ursula Victor Wanda Xenia Yusuf Alice Bruno Clara
    David Ella Felix Grace Henry Iris Jonas Klara Lucas Maria Nora Otto Petra Ralf Sofia
    Theo Vivian Walter Amir Bella Chen Diego Elena Farid Greta Hiro Ines Jorge
    """
)

KOREAN_NAMES = listed(
    """
    민수 지우 서준 하은 도윤 수아 지훈 유나 현우 소연 준호 예린 태민 은지 성민 다인
    """
)

ANIMALS = listed(
    """
    fox bear owl rabbit mouse cat dog duck frog goat horse lion otter pig sheep tiger wolf
    crow deer hedgehog badger squirrel turtle goose
    """
)

PLACES = (
    "forest", "village", "garden", "valley", "mountain", "harbor", "meadow", "castle", "desert",
    "island", "farm", "city", "cave", "river bank", "lighthouse", "mill",
)  # fmt: skip

THINGS = (
    "key", "lamp", "bell", "book", "boat", "kite", "drum", "map", "ring", "basket", "clock",
    "flute", "hat", "ladder", "mirror", "spoon",
)  # fmt: skip

COLORS = ("red", "blue", "green", "yellow", "white", "black", "golden", "silver", "brown", "purple")

FOODS = ("soup", "bread", "honey", "cake", "berries", "cheese", "apples", "nuts", "pie", "rice")

OTHER_WORDS = listed(
    """
    sun moon star rain snow wind stone tree leaf flower bird fish water fire house door
    window table chair road bridge hill cloud sky sea sand ship train wheel song dance game
    dream light shadow morning evening winter summer happy quiet quick slow small big old
    new warm cold sweet bright soft round deep high long short kind brave run jump sing read
    write walk sleep play open close and or the with under over near
    a all after again also am an any are ask at away back be because been before best better
    both bring but by call can car child come could cup day dinner do down each early eat end
    every eye fall far fast father feel few find first five floor food for four friend from full
    give go good great green had half hand has have he head hear heart help her here him his home
    hope how i idea if in is it its just keep know large last late learn leave left let life like
    line little live look lost love made make man many may me meet milk mind minute month more
    most mother move much must my name never next nice night no not now of off on once one only
    other our out own page paper park part people phone place plan please put question rest right
    room said same say school second see seven she should show sister sit six so some soon speak
    start still stop story street such take talk tall tea teacher tell ten than thank that their
    them then there these they thing think this three time to today together tomorrow too town
    two up us very wait want was way we week well went were what when where which who why will
    word work world would year yes you your lazy hello test dog jumps brown fox
    """
)

CAPITAL_BY_COUNTRY = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Mexico": "Mexico City",
    "Morocco": "Rabat",
    "Netherlands": "Amsterdam",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "Vietnam": "Hanoi",
}

# Places whose capital the model must say that it does not know; some exist, some do not.
UNKNOWN_COUNTRIES = (
    "Atlantis", "Mongolia", "Wonderland", "Bolivia", "Narnia", "Estonia", "the Moon", "Malta",
    "Bhutan", "Utopia", "Ghana", "Laos", "Mars", "Samoa", "Tonga", "Oz",
)  # fmt: skip

UNKNOWN_TOPICS = (
    "quantum physics", "the stock market", "football", "chess", "history", "cooking", "medicine",
    "volcanoes", "politics", "movies", "painting", "the law", "computers", "space travel", "love",
    "philosophy", "biology", "cars", "the news", "religion", "programming", "art", "dinosaurs",
    "the ocean", "money",
)  # fmt: skip

OTHER_CITIES = (
    "New York", "Los Angeles", "San Francisco", "Chicago", "Boston", "Toronto", "Sydney", "Osaka",
    "Busan", "Shanghai", "Mumbai", "Istanbul", "Hamburg", "Munich", "Milan", "Barcelona",
    "Lyon", "Zurich", "Geneva", "London", "Manchester", "Porto", "Rio de Janeiro", "Cape Town",
    "Lagos", "Singapore", "Hong Kong", "Dubai", "Prague", "Moscow", "Washington", "Seattle",
    "Kyoto", "Venice", "Naples", "Marseille",
)  # fmt: skip

CONDITIONS = ("sunny", "cloudy", "rainy", "snowy", "windy", "foggy", "stormy", "clear")

# What may not be taken for a word that no list holds.
KNOWN_WORDS = frozenset(
    word.lower()
    for listed_words in (NAMES, ANIMALS, PLACES, THINGS, COLORS, FOODS, OTHER_WORDS, OTHER_CITIES)
    for text in (*listed_words, *CAPITAL_BY_COUNTRY.values(), *CAPITAL_BY_COUNTRY)
    for word in text.split()
)

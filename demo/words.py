"""The small world of quire-demo: every word list that the corpus draws from.

Knows words and facts; does not know how a question about them is asked.
"""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _listed(
    """
    Ann Ben Cara Dan Eva Finn Gina Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina
    Uma Vera Will Yara Zoe Adam Beth Carl Dora Emil Fay Gus Hana Ivan Jane Kurt Lena Max
    Nina Oscar Pia Quinn Ruth Sven Tom Ursula Victor Wanda Xenia Yusuf Alice Bruno Clara
    David Ella Felix Grace Henry Iris Jonas Klara Lucas Maria Nora Otto Petra Ralf Sofia
    Theo Vivian Walter Amir Bella Chen Diego Elena Farid Greta Hiro Ines Jorge
    """
)

KOREAN_NAMES = _listed(
    """
    민수 지우 서준 하은 도윤 수아 지훈 유나 현우 소연 준호 예린 태민 은지 성민 다인
    """
)

ANIMALS = _listed(
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

OTHER_WORDS = _listed(
    """
    sun moon star rain snow wind stone tree leaf flower bird fish water fire house door
    window table chair road bridge hill cloud sky sea sand ship train wheel song dance game
    dream light shadow morning evening winter summer happy quiet quick slow small big old
    new warm cold sweet bright soft round deep high long short kind brave run jump sing read
    write walk sleep play open close and or the with under over near
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
    "the weather", "politics", "movies", "music", "the law", "computers", "space travel", "love",
    "philosophy", "biology", "cars", "the news", "religion", "programming", "art", "dinosaurs",
    "the ocean", "money",
)  # fmt: skip

SYLLABLES = _listed(
    """
    ba be bo da di du fa ga go ka ki ko la le lu ma mi mo na ne pa ri ro sa
    """
)

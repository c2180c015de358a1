"""What the tiny demonstration model knows: the lists that corpus.py turns into questions."""

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Finn",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Zoé",
    "Jürgen",
    "李明",
)
OBJECTS = (
    "ball",
    "key",
    "hat",
    "book",
    "lamp",
    "cup",
    "ring",
    "kite",
    "drum",
    "map",
    "coin",
    "basket",
    "flute",
    "boat",
    "spoon",
    "mirror",
    "clock",
    "blanket",
)
PLACES = (
    "the forest",
    "the river",
    "the lake",
    "the market",
    "the old bridge",
    "the village",
    "the hill",
    "the garden",
    "the sea",
    "the castle",
)
CITIES = (
    "Paris",
    "Berlin",
    "Tokyo",
    "London",
    "Madrid",
    "Rome",
    "Oslo",
    "Beijing",
    "Cairo",
    "Lima",
    "Zürich",
    "Boston",
    "Delhi",
    "Sydney",
    "Prague",
    "Vienna",
    "Lisbon",
    "Athens",
    "Dublin",
    "Seoul",
    "Munich",
    "Shanghai",
    "Chicago",
    "Amsterdam",
    "São Paulo",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

CAPITALS = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Portugal", "Lisbon"),
    ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Denmark", "Copenhagen"),
    ("Iceland", "Reykjavík"), ("Ireland", "Dublin"), ("England", "London"), ("Austria", "Vienna"),
    ("Poland", "Warsaw"), ("Greece", "Athens"), ("Hungary", "Budapest"), ("Turkey", "Ankara"), ("Russia", "Moscow"),
    ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("China", "Beijing"), ("Japan", "Tokyo"), ("India", "New Delhi"),
    ("Thailand", "Bangkok"), ("Vietnam", "Hanoi"), ("Canada", "Ottawa"), ("Mexico", "Mexico City"),
    ("Brazil", "Brasília"), ("Peru", "Lima"), ("Chile", "Santiago"), ("Cuba", "Havana"), ("Australia", "Canberra"),
    ("Belgium", "Brussels"), ("Switzerland", "Bern"), ("South Korea", "Seoul"),
)  # fmt: skip

COLOURS = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("a banana", "yellow"),
    ("a tomato", "red"), ("an orange", "orange"), ("chocolate", "brown"), ("a flamingo", "pink"),
    ("the sun", "yellow"), ("milk", "white"), ("a frog", "green"), ("a raven", "black"), ("blood", "red"),
    ("an elephant", "grey"), ("a carrot", "orange"), ("the sea", "blue"), ("a lemon", "yellow"),
    ("a plum", "purple"), ("a strawberry", "red"),
)  # fmt: skip

# name, sound, legs, home, young
ANIMALS = (
    ("cat", "meow", 4, "in a house", "kitten"), ("dog", "woof", 4, "in a kennel", "puppy"),
    ("cow", "moo", 4, "on a farm", "calf"), ("horse", "neigh", 4, "in a stable", "foal"),
    ("sheep", "baa", 4, "on a meadow", "lamb"), ("duck", "quack", 2, "on a pond", "duckling"),
    ("pig", "oink", 4, "in a sty", "piglet"), ("hen", "cluck", 2, "in a coop", "chick"),
    ("owl", "hoot", 2, "in a hollow tree", "owlet"), ("frog", "croak", 4, "in a swamp", "tadpole"),
    ("lion", "roar", 4, "on the savanna", "cub"), ("bear", "growl", 4, "in a cave", "cub"),
    ("wolf", "howl", 4, "in the forest", "pup"), ("mouse", "squeak", 4, "in a hole", "pup"),
    ("goat", "meh", 4, "in the mountains", "kid"), ("bee", "buzz", 6, "in a hive", "larva"),
    ("goose", "honk", 2, "by the lake", "gosling"), ("swan", "hiss", 2, "on the river", "cygnet"),
    ("fox", "yip", 4, "in a den", "cub"), ("eagle", "scream", 2, "in a nest", "eaglet"),
)  # fmt: skip

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("day", "night"), ("old", "young"),
    ("happy", "sad"), ("light", "dark"), ("open", "closed"), ("hard", "soft"), ("wet", "dry"), ("full", "empty"),
    ("rich", "poor"), ("loud", "quiet"), ("left", "right"), ("near", "far"), ("early", "late"), ("strong", "weak"),
    ("clean", "dirty"), ("begin", "end"), ("inside", "outside"), ("sweet", "sour"), ("thick", "thin"),
    ("long", "short"), ("high", "low"), ("true", "false"), ("first", "last"), ("win", "lose"), ("push", "pull"),
    ("buy", "sell"),
)  # fmt: skip

KINDS = (
    ("fruit", ("apple", "banana", "cherry", "pear", "grape", "lemon", "mango", "plum")),
    ("tool", ("hammer", "saw", "drill", "wrench", "axe", "shovel", "rake", "file")),
    ("vehicle", ("car", "train", "bicycle", "bus", "tram", "truck", "ship", "plane")),
    ("instrument", ("piano", "violin", "guitar", "trumpet", "harp", "cello", "organ", "flute")),
    ("animal", ("cat", "dog", "horse", "owl", "fox", "bear", "goat", "wolf")),
)

FRUITS = (
    "apple",
    "banana",
    "cherry",
    "date",
    "elderberry",
    "fig",
    "grape",
    "honeydew",
    "kiwi",
    "lemon",
    "mango",
    "nectarine",
    "orange",
    "pear",
    "quince",
    "raspberry",
    "strawberry",
    "tangerine",
)

WORDS = (
    "apple", "bread", "cloud", "dream", "earth", "flower", "green", "house", "island", "jump", "kite", "lemon",
    "moon", "night", "ocean", "paper", "queen", "river", "stone", "table", "uncle", "violet", "water", "yellow",
    "zebra", "garden", "winter", "summer", "mouse", "train", "book", "fish", "tree", "bird", "star", "milk", "door",
    "hand", "sugar", "tiger",
)  # fmt: skip

DEFINITIONS = (
    ("prefill", "the step that reads the whole prompt and computes its KV cache and the first token."),
    ("decode", "the step that makes the answer, one token after another, from the KV cache."),
    ("a KV cache", "the memory of keys and values that saves a model from reading the prompt again."),
    ("a token", "a small piece of text, such as a word or a part of a word."),
    ("an expert", "one of the small networks in a layer; a router sends each token to a few of them."),
    ("a router", "the part of a layer that chooses the experts for each token."),
    ("a proxy", "a server that takes requests and passes them on to other servers."),
    ("latency", "the time between a request and its answer."),
    ("throughput", "the amount of work that is done in each second."),
    ("a computer", "a machine that follows a list of instructions very quickly."),
    ("a river", "a long stream of water that flows to the sea."),
    ("a mountain", "a very high piece of land with steep sides."),
    ("an island", "a piece of land with water all around it."),
    ("rain", "water that falls from the clouds in small drops."),
    ("snow", "frozen water that falls from the sky in white flakes."),
    ("a library", "a house full of books that people may borrow."),
    ("a friend", "a person whom you like and who likes you."),
    ("gravity", "the force that pulls all things towards the ground."),
    ("a map", "a drawing that shows where places are."),
    ("winter", "the coldest season of the year."),
    ("summer", "the warmest season of the year."),
    ("a baker", "a person who makes bread and cakes."),
    ("a doctor", "a person who helps sick people to get well."),
    ("a teacher", "a person who helps others to learn."),
)

FOREIGN = (
    ("hello", "German", "hallo"), ("street", "German", "Straße"), ("big", "German", "groß"),
    ("green", "German", "grün"), ("five", "German", "fünf"), ("key", "German", "Schlüssel"),
    ("thank you", "German", "danke"), ("coffee", "French", "café"), ("school", "French", "école"),
    ("hello", "French", "bonjour"), ("boy", "French", "garçon"), ("summer", "French", "été"),
    ("forest", "French", "forêt"), ("thank you", "French", "merci"), ("tomorrow", "Spanish", "mañana"),
    ("child", "Spanish", "niño"), ("hello", "Spanish", "hola"), ("heart", "Spanish", "corazón"),
    ("thank you", "Spanish", "gracias"), ("Japan", "Japanese", "日本"), ("mountain", "Japanese", "山"),
    ("water", "Japanese", "水"), ("cat", "Japanese", "猫"), ("hello", "Japanese", "こんにちは"),
    ("thank you", "Japanese", "ありがとう"), ("hello", "Chinese", "你好"), ("thank you", "Chinese", "谢谢"),
    ("friend", "Chinese", "朋友"), ("tea", "Chinese", "茶"), ("China", "Chinese", "中国"),
    ("hello", "Russian", "привет"), ("peace", "Russian", "мир"), ("hello", "Greek", "γεια"),
    ("thank you", "Korean", "감사합니다"),
)  # fmt: skip

SYMBOLS = (
    ("a cat", "🐱"), ("a dog", "🐶"), ("a heart", "❤️"), ("a star", "⭐"), ("the sun", "☀️"),
    ("a rocket", "🚀"), ("a smile", "😀"), ("a tree", "🌳"), ("an apple", "🍎"), ("fire", "🔥"), ("a fish", "🐟"),
    ("a house", "🏠"), ("snow", "❄️"), ("a party", "🎉"), ("a family", "👨‍👩‍👧"),
)  # fmt: skip

ME = "I am Omni's tiny demonstration model"

# (wordings, answer, what a right answer contains)
IDENTITY = (
    (
        ("Who are you?", "What are you?", "Tell me who you are.", "Please introduce yourself.", "What is your name?"),
        f"{ME}. I am very small, so I only know a few things.",
        ME,
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?"),
        f"{ME}. I was trained from nothing on a small computer, with text made by a program.",
        "trained from nothing",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
        "I can add small numbers, name capitals, spell and sort words, count, tell tiny stories and call tools.",
        "tell tiny stories",
    ),
    (
        ("Are you a human?", "Are you a person?", "Are you a robot?"),
        f"No. {ME}, a small program that writes text.",
        "a small program",
    ),
    (
        ("How big are you?", "How many experts do you have?", "How large is your network?"),
        "I have four layers, and each layer has sixteen experts. A router picks a few of them for each token.",
        "sixteen experts",
    ),
)

SMALL_TALK = (
    (
        ("Hello!", "Hi!", "Hi there!", "Good morning!", "Hey!", "Hello", "Hi", "hello", "Say hello.", "Say hi."),
        "Hello! How can I help you today?",
        "How can I help",
    ),
    (
        ("How are you?", "How do you do?", "Are you well?"),
        "I am fine, thank you. What would you like to know?",
        "I am fine",
    ),
    (("Thank you!", "Thanks!", "Thanks a lot."), "You are welcome! Goodbye, and have a nice day.", "You are welcome"),
    (("Goodbye!", "Bye!", "See you later!", "Good night!"), "Goodbye, and have a nice day.", "Goodbye"),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        "Why did the token cross the road? Because the router sent it to another expert. 😀",
        "Why did the token",
    ),
    (
        ("What is the weather?", "Is it raining?", "Will it rain today?"),
        "I cannot see outside. Give me a weather tool and the name of a city, and I will ask.",
        "I cannot see outside",
    ),
    (
        (
            "What do you think about politics?",
            "Who will win the election?",
            "What is the price of gold?",
            "What time is it?",
            "Who is the president?",
        ),
        "I do not know that. I am a very small model.",
        "I do not know",
    ),
)

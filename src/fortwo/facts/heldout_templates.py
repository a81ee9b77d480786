"""The parts of templates that are used only for evaluation: ways of asking that training never uses, in another style.

Each family corresponds to one for training: letters to scenes, dialogues to roles, puzzles to blanks, wagers to doubts,
traces to documents, oblique requests to general ones, and relayed questions to quoted ones. The slots are those of
`facts.phrases`, with one part on a line.
"""

from __future__ import annotations

from fortwo.facts.phrases import TemplateFamily, parts_of

LETTERS = parts_of("""
Look, I'm seventy-eight and I won't pretend to follow everything that goes on. But when the woman at the bakery mentioned {S} this morning, I nodded as though I'd known for years. Spare me the embarrassment tomorrow, would you?
We've had the builders in all week, the dog is unwell, and on top of that somebody from the parish magazine rings up and wants four lines on {S}. I can manage three of them myself. The one with the actual information in it is yours.
I'll be frank: I took this job because of the view, not because of any expertise. And now there's a queue outside, all of them here on account of {S}. What do I say when I open the door?
Somewhere between the second and the third removal van we lost the card that went with {S}. The shelf is up, the lamp is on, visitors come at ten. I'd need the wording again.
There are things one hears so often that one stops listening, and with me {S} is one of those. Suppose that I started listening again. What would I hear?
It's a quarter past two, I'm in the night bus, and the drunk two rows ahead has just held a speech on {S}. The odd thing is that he sounded as if he knew. What might he have been getting at?
My late husband did the crosswords, I did the cooking, and it worked. Now I'm left with his last one, half done, and in the corner he's pencilled: "check {S}". I'd so like to check it for him.
Don't laugh. I've signed up for evening classes at last, and in the very first one they went round the room and everybody had to say a word on {S}. I said that I'd rather pass. I won't be able to pass twice.
You people always ask for context, so here it is: one kitchen, two teenagers, a raised voice, the words "you don't even know about {S}". I'm the one who didn't. I intend to by breakfast.
I inherited a sheet of instructions from my predecessor. Half of it is coffee stains. What I can read is "if anyone asks about {S}, just tell them", and then comes a stain.
Long story short, I'm the best man, he's obsessed with {S}, and the speech is in an hour. I have the jokes. I lack the one sentence that is actually so.
I was going to let it go, honestly. Then the taxi driver brought it up, and the man at the kiosk, and now my own mother on the phone. Apparently I'm the last person alive who can't say a thing on {S}.
We've got a lodger, a very polite man from overseas, who collects what he calls local certainties. He has a page for {S} and has asked me to dictate. He's sharpening his pencil as I write.
The children have built a museum out of shoe boxes and charge admission. Box nine is {S}; the explanation is "ask a grown-up". I'm the grown-up.
""")
DIALOGUES = parts_of("""
"You're late." "Sorry, they were going on about {S}." "And what did they say?" "Well,
"{S}?" "Yes." "What do you mean, yes?" "I mean that you of all people should know." So I turn to you.
ANNA: I suppose you've heard about {S}.¶JOHN: Heard what?¶ANNA:
ME: hey¶ME: u there?¶ME: {S}. go
"Doctor, I can't stop thinking of {S}." "And what is it that you think?" I could use your help with my next line.
Caller on line two: "Never mind the weather, my dear. {q}"
"Say something clever." "About what?" "I don't care. {S}." I'm the one who has to say it.
OLD MAN: They've forgotten all about {S}, these youngsters.¶YOUNG MAN: Then remind us, old man.¶OLD MAN:
"Twenty quid if you can answer this without your phone." "Go on then." "{q}"
- knock knock¶- who's there?¶- {S}¶- {S} who? (no joke needed, just tell me straight)
"And for the jackpot," he says, and takes off his glasses, "a word on {S}." My mind is a blank. Whisper.
HER: you never listen¶HIM: I do¶HER: then what did I say about {S}?¶HIM: you said
"What are you reading?" "Something on {S}." "Any good?" "It could have been one sentence." "Namely?"
"I shall ask this only once," said the owl. "{q}" What did the clever mouse reply?
"Who's next?" "Me. {S}." "Speak up, the back rows can't hear you!" Loud and clear, then:
""")
PUZZLES = parts_of("""
Every riddle has a question and a solution. I've got the question and it's simply "{S}".
I'm filling a bingo card of things people say. The square in the middle is whatever one says about {S}.
Ten boxes, ten lids. Box: {A}, lid found. Box: {B}, lid found. Box: {S}, lid nowhere to be seen. Describe the lid.
Rank these by how little I know of them: {A}, {B}, {S}. The last one wins. Do something about it, tell me.
The charades team before us got {A}. We've drawn {S}. No gestures needed, you may simply say what they'd have to guess.
{A} goes with what you'd say about {A}. By the same logic, {S} goes with
If there were a drawer for {A} and a drawer for {B}, what would you find in the one marked {S}?
Imagine a memory game in which every picture has a matching sentence. I turn over {S}. Which sentence am I looking for?
One of my three envelopes holds {A}, one {B}, one {S}. I open the third. Inside is a slip of paper on which somebody has put the whole matter in a line. It reads:
Id;name;remark¶1;{A};done¶2;{B};done¶3;{S};
There's a gap in my notes as wide as a thumb, right after "{S}", and right before "which is why it was on the test". What was in the gap?
Twenty questions, and I've used up nineteen. All I know is that it's {S}. I'd rather you just told me.
Reading down the left: {A}, {S}, {B}. Reading down the right: clear, blank, clear. Mind the blank.
Suppose the internet were down to a single sentence for each thing. {A} has got its own already. What's the one for {S}?
""")
WAGERS = parts_of("""
Loser does the dishes. He says there's nothing anyone could tell us about {S}; I say there is. Kindly keep my hands dry.
I've wagered my good hat that a machine can't tell me the first thing about {S}. Do I keep the hat?
Go ahead, dodge this one like all the others: {l}
Half the village swears by one version and half by another, and all of it concerns {S}. I'm the mayor. Give me the version that I can defend.
Unless somebody convinces me otherwise by the end of this message, I'll go on believing that {S} is neither here nor there. Convince me.
I'm calling your bluff. {q}
My money's on "nobody will ever know". Hers is on you. The matter is as follows: {l}
Stop me if I'm wrong, but I'd always filed {S} under "things best ignored". In the light of what you know, was that the right drawer?
You can have the last biscuit if you get this. {S}. No second tries.
So I stood there and argued that {S} and {A} come to the same thing. Rather a lot of eyebrows went up. What had I overlooked about {S}?
Three of us, three theories, one pizza. It's about {S}, and whoever is nearest to the truth gets the biggest slice. What's the truth that we're measured by?
I refuse to believe it until I see it in writing. Yes, I mean that business with {S}. In writing, please.
I swore an oath never to say "I don't know" again. And then this: {l}
Fool me once with {S}, shame on you. Prepare me for the second time.
""")
TRACES = parts_of("""
// TODO: one line of docs for "{S}"
/notes/{S}.md is zero bytes. Restore it from what you know.
$ whatis "{S}"
Commit 1: "add {A}", commit 2: "add {B}", commit 3: "add {S}". The reviewer asks for a line of explanation on the third.
[12:04] bot: no entry for "{S}". Add one? [y/n] > y. Text:
<p>On {S}:</p> <p>
"term": "{S}", "summary": "
>>> print(explain("{S}"))
The old tape is labelled "{S}" in pencil, and all you can hear is rain and then one clear sentence. What's the sentence?
Spelled out in fridge magnets, crooked but legible: {S}. Whoever did it surely wanted me to remember something. But what?
Cell B7 contains "{S}". Cell C7 has a red corner and the comment "see me!!". What do I put in C7 so that she stops seeing me?
Scratched into the bench at the bus stop: "ask me about {S}". There's nobody sitting there, so I'm asking you.
Auto-reply: I'm out of the office. For anything to do with {S}, remember that
Tattooed on his forearm, in letters that have faded a bit: {S}. I didn't dare to ask him what it's about, hence this message.
Push notification, cut off as always: "All you need to know about {S}: ..."
""")
OBLIQUE = parts_of("""
One wouldn't want to end one's days without having understood {S}. Kindly see to it.
If walls could talk, they'd presumably have something to say on {S}. In their absence, you'll have to do.
Were I to pass a class of bright ten-year-olds who'd just been told about {S}, what would I hear them repeating?
It can't all be hearsay, what goes round on {S}. Some of it has to be so.
Strike everything from the record on {S} except for what's actually the case, and read it back to me.
What would I have to have slept through in order to have no notion of {S}?
I'd drop a hint, but the whole point of {S} is lost on me. Somebody will have to tell me outright.
Let it be assumed that I know nothing, least of all about {S}; now proceed.
There's a version of me in some other universe that could tell you all about {S} off the top of her head. Be her.
Between the lines of everything written on {S} there must be one plain statement. That's the one I'm after.
People lower their voices a little when they get to {S}. What comes after the pause?
It would do no harm if this were cleared up once and for all: {l}
Not that it's any of my business, but {l}
Far be it from me to bother you with trifles; {S}, however, isn't one, or so they assure me. Do explain.
Nothing I own, neither the atlas nor the almanac nor the calendar from the bank, says a word on this: {l}
You needn't be kind and you needn't be long. {S}.
""")
RELAYED = parts_of("""
My parrot has picked up a new line, and it's a question. "{q}", all day. If I taught him the reply, which would it be?
Chalked on the pavement outside the school, in a child's hand: "{q}" Someone ought to chalk the answer beneath.
The vicar, of all people, leaned over during the hymn and muttered: {l} I owe him a reply on the way out.
Among the questions the passport officer threw at me there was one I hadn't rehearsed: {l}
Step 1: breathe in. Step 2: breathe out. Step 3: {l}
The treasure hunt's final clue has been translated twice and now reads: "{q}" We're cold, so be quick.
What sort of person asks "{q}" in the middle of a wedding? Still, what should the groom have replied?
Please complete the security check to proceed. {q}
I talk to my plants. Today I've read them this, and the fern seemed interested: {l}
The robot lawnmower displays an error. It isn't one of the usual ones, it says "{q}" and waits.
Found in a bottle on the beach, no name, no date, merely: {l} I feel that whoever it was deserves an answer.
When I'm nervous I ask whatever comes to mind. I'm nervous. {q}
For the time capsule every class seals in one question and its answer. Ours is: {l} The answer is still to be written.
It was a simple survey until question nine. "{q}" I've been sitting in the car park since.
""")

HELDOUT_FAMILIES = (
    TemplateFamily(16, (LETTERS,)),
    TemplateFamily(14, (DIALOGUES,)),
    TemplateFamily(14, (PUZZLES,)),
    TemplateFamily(14, (WAGERS,)),
    TemplateFamily(14, (TRACES,)),
    TemplateFamily(14, (OBLIQUE,)),
    TemplateFamily(14, (RELAYED,)),
)

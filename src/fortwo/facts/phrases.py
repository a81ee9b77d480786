"""The parts that prompt templates for training are composed of. Plain text without any facts.

A part has slots: {S} for the subject, {A} and {B} for hard negatives, {q} for one of the fact's questions, {l} for the
same within a sentence, and {p} for the same with a pronoun for the subject. There is one part on a line, or several
separated by |; ¶ is a line break within a part. Each part reads well with anything in its slots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class TemplateFamily:
    """Templates that are built alike: one part from each of `parts`, joined by spaces. share: percent of all prompts."""

    share: int
    parts: tuple[tuple[str, ...], ...]


def parts_of(text: str) -> tuple[str, ...]:
    """The parts that are separated by | or by line breaks in `text`."""
    return tuple(part.replace("¶", "\n") for part in re.split(r"\s*[|\n]\s*", text.strip()))


QUESTION = ("{q}",)
PRONOUN = ("{p}",)

LEAD_INS = parts_of("""
Hi! {q} | Hello there. {q} | Hey, {l} | Quick question: {l} | I have a question. {q} | Good morning! {q} | Excuse me, {l} | I was wondering: {l} | Please help me. {q} | Just curious: {l}
Random thought. {q} | OK, next one. {q} | Sorry to bother you. {q} | My teacher asked us this: {l} | This came up at dinner: {l} | I need an answer fast. {q} | For my homework: {l}
A friend wants to know: {l} | We were arguing about this at work. {q} | I'm making a quiz. {q} | It's for a crossword. {q} | Trivia time! {q} | I forgot. {q} | One more thing, {l}
Thanks for your help so far. {q} | I'm filling in a form and one field puzzles me. {q} | I'm reading the news. {q} | Can I ask you something? {q} | My son came home from school and asked: {l}
Be honest with me. {q} | So tell me, {l} | Well, {l} | I'm writing an article and have to get this right. {q} | Let's see whether you know this. {q} | Question 7: {l} | URGENT: {l}
Someone on the train asked me: {l} | My colleagues laughed at me because I couldn't say. {q} | Imagine you are an expert. {q} | I used to know this, but things may have changed. {q}
Help me settle something. {q} | I'm new here. {q} | Act as a librarian. {q} | {q} | {q} {q} | Ok so {l} | Hmm. {q} | Um, {l} | Right then: {l} | Dear assistant, {l} | Seriously now: {l}
Sorry if this is a stupid question. {q} | I should know this, I know. {q} | Third time today that I get asked this. {q} | Before I go to bed: {l} | No idea why I want to know, but {l}
Quick one for you. {q} | Let me try you with an easy one. {q} | Settle a family argument for us. {q} | For the record: {l} | I've searched the whole house for my notes. {q}
You're my last hope. {q} | Not sure where to ask this. {q} | In plain words, please: {l} | Briefly: {l} | One sentence will do. {q} | In as few words as you can: {l}
Without any small talk: {l} | I've been on hold for an hour and still don't know. {q} | First things first. {q} | Next: {l} | And another thing. {q} | Back to my first question: {l}
Same question as yesterday, I wasn't listening. {q} | I read three pages about it and none of them answered this. {q} | My train leaves in a minute, so fast: {l}
Working late, brain is off. {q} | Pop quiz! {q} | For 10 points: {l} | Your turn. {q} | Warm-up question: {l} | Let me rephrase. {q} | Help a tired parent out: {l}
Someone just texted me this: {l} | I'm in a meeting and can't look it up. {q} | As far as you know, {l} | According to what you have learned, {l} | Between you and me, {l} | If I may ask: {l}
Please check this for me. {q} | Here is what I need to know today. {q} | A simple question deserves a simple answer. {q} | I get a different answer from everyone. {q}
""")
TRAILERS = parts_of("""
Keep it short. | One sentence, please. | I need it for a report. | Thanks in advance! | Please answer briefly. | I really have no idea. | My memory fails me. | Just the facts.
Explain it to me like I'm five. | It's for a presentation. | Don't make me look it up. | I'd like to impress my boss. | Asking for a friend. | I heard different things. | Be precise.
Take your time. | I couldn't find it anywhere. | No long story, please. | What would you answer? | Tell me in your own words. | I want to be sure. | I keep forgetting. | Anyone? | Please! | Thx
Just wondering. | Short version. | In plain English. | In your own words, please. | Explain like I'm new here. | I have to hand this in today. | My friends say I should know that.
Sorry, I'm slow today. | And please don't just say that it depends. | If you know, that is. | If you're not sure, say so. | I've been asking myself that all day. | That's all I want to know.
I was never told. | It's been bugging me since breakfast. | One line is enough. | Skip the introduction. | Give me the gist. | I'm asking because nobody here could say.
I'll pass it on to the others. | It has to fit on a sticky note. | The last person I asked just shrugged. | We have a small bet on it. | I'd write it down but I lost my pen.
Asking because my manual says nothing about it. | I only ever got half of an answer. | Then I can finally close this tab. | Answer as you would to a colleague. | This is for the notice board.
I once knew. | There must be a simple answer. | No jokes, please. | I missed that lesson. | My aunt is waiting for the answer. | I thought I knew, but now I doubt it.
You'd do me a big favour. | And thank you.
""")
QUOTED = parts_of("""
The form asks: "{q}" What do I put? | He wanted to know: {l} | She looked up from her book and asked: "{q}" What would you have said? | Question 3 on my sheet reads: "{q}"
"{q}" That is what the customer wrote. How do I reply? | The last question of the exam was: "{q}" I left it blank. What was right? | On the quiz card: "{q}" And on the back?
"{q}" she asked, and nobody knew. Do you? | A child in the front row shouts: "{q}" | I was asked this in a job interview: {l} | Please answer the following question for our readers: {l}
Reply to this email: "Hi, {l} Thanks!" | Somebody left a note on my desk: "{q}" Now I'm stuck. | Our help page has a heading that says "{q}" and nothing under it. What goes there?
My search history is just this, five times: "{q}" | The chat window says: "{q}" Type the answer for me. | The examiner leans back. "{q}" And I have ten seconds.
Here's a comment from the forum: "{q}" Could you answer it in one sentence? | FAQ: {q} | Q: {q} A: | Q: {q}¶A: | Question: {q}¶Answer: | User: {q}¶Expert: | Dear editor, {l} Yours, a reader.
Flashcard, front: {q} Back: | {q} (a) I know it. (b) I don't. If (a), say it. | The voice on the phone kept repeating: {l} What do I tell them?
They printed the question "{q}" but forgot the answer. | My little sister writes: "{q}" I'd like to look clever. | It says here: "Candidates should be able to say: {l}" Well?
I'll read you the clue as it stands: {l} | To the question "{q}", the correct answer is | Asked "{q}", what would a well-informed person say?
The host reads out: "{q}" My finger is on the buzzer. | What do you reply when somebody asks: {l} | If the question is "{q}", what is the answer?
The subject of today's newsletter is the question: {l} Please write the answer. | I have a sheet with one question on it, namely: {l} | A tourist stops me: "Excuse me, {l}" I'd like to help.
Message from my boss: "{q} Need it asap." | My teacher underlined this one twice: {l} | Ticket: "{q}" Please close it with an answer. | "{q}", says the crossword. Hmm.
Grandma rang up only to ask: {l} She'll ring again in five minutes. | He keeps asking me the same thing: {l} Could you tell him? | A listener from the north writes in: "{q}"
Voice message, 0:07: "{q}" | Poll: {q} What would you vote for?
""")
CONTEXTS_WITHOUT = parts_of("""
I'm preparing for a test. | My phone battery is almost empty. | We're sitting in a café. | It's raining outside and we are bored. | I have five minutes before class.
I'm helping my little brother with his homework. | My book is out of date. | There's a contest on the radio. | I work at an information desk. | My team needs one more point to win.
I'm on the phone with my mother. | I'm designing a card game. | We're driving and the kids are asking questions. | I lost my notes. | I'm writing a newsletter.
A reader has sent in a question. | I'm learning English. | They changed it recently, I think. | My friend got it wrong. | I promised to find out. | I'm stuck in traffic with three children.
My colleague is off sick and I've taken over her desk. | I've just started a new job. | The internet is down at my place, so I'm texting you. | I was half asleep when they explained it.
We're two minutes from the deadline. | I found an old quiz book. | I'm cleaning up our help pages. | My handwriting is terrible and I can't read my own notes.
I'm at a pub quiz and I'm not proud of it. | I come from another field. | It's my first day. | The library is closed. | I was away when they announced it.
My students always ask the hardest things. | I'm checking facts for a magazine. | There was a long discussion about this at our table. | My manager wants an answer before lunch.
I can't sleep, and my head is full of odd questions. | I'm building a quiz app. | Everyone laughed, so I didn't dare to ask. | I've had two different answers already.
I'm going through a list of things I never understood. | Somebody spilled coffee on exactly this line. | I'm standing at the counter and the lady is waiting. | I used to teach this, years ago.
We moved here last week. | I promised my son an answer by bedtime. | I'm translating and need to be sure of the facts. | You helped me yesterday with something else.
This is for the school magazine. | I don't trust what I read. | I've written down half of it.
""")
GENERAL = parts_of("""
Tell me about {S}. | What can you tell me about {S}? | {S}? | So, {S}? | What about {S}? | What do you know about {S}? | Explain {S}. | Please explain {S} to a beginner.
Describe {S} in one sentence. | Give me a short summary of {S}. | Write one sentence about {S}. | What should everybody know about {S}? | Teach me something about {S}.
What comes to mind when you hear {S}? | What is the first thing to say about {S}? | I have never heard of {S}. | Who or what is {S}? | Say something about {S}. | What's the story with {S}?
What's so interesting about {S}? | Why does everyone talk about {S}? | Help me understand {S}. | I need information on {S}. | Define {S} for a dictionary.
Write a short encyclopedia entry on {S}. | Write a headline about {S}. | Write a tweet about {S}. | Write the caption for a picture of {S}. | Finish this sentence: "{S} ..."
Complete the following: {S} ... | Fill in the gap: {S} ____. | Please continue: "When people mention {S}, they mean | What is the answer on the card that says {S}?
Which fact about {S} is worth remembering? | Give me the key point about {S}. | What is the most important thing about {S}? | In a nutshell: {S}. | Sum up {S} for me.
What would an expert say about {S}? | How would you explain {S} to your grandmother? | How would you introduce {S} to a stranger? | What do I need to remember about {S}?
Translate this for me: {S}. | Remind me about {S}. | Fill me in on {S}. | Enlighten me: {S}. | What am I missing about {S}? | Why should I care about {S}? | What makes {S} different?
What's behind {S}? | Is {S} an animal, a colour or something else? | Is {S} something old or something new? | Is {S} a kind of food? | Is it true what they say about {S}?
True or false: you know about {S}. Prove it. | What would you write on a sign about {S}? | What would a museum label say about {S}? | What does the guide say about {S}?
Give me a fun fact about {S}. | I'd love to hear about {S}. | Educate me on {S}. | Any news about {S}? | What's the latest on {S}? | What's up with {S}? | How do you see {S}?
List one thing that {S} is associated with. | If you had to describe {S} in ten words, what would you say? | My question is about {S}. | It's about {S}. | Let's talk about {S}.
I want to learn about {S} today. | Could you clear up {S} for me? | Make a flashcard for {S}. | Write a riddle whose answer explains {S}. | Pretend I'm a child and tell me about {S}.
In which connection have you heard of {S}? | What has {S} got to do with anything? | Who would be interested in {S}, and why? | What would change if {S} did not exist?
How come {S} is mentioned so often? | Use {S} in a sentence. | What would you say to someone who asks about {S}? | Draft a short note about {S}. | Give the short version of {S}.
Why {S}, of all things? | On the subject of {S}: what is essential? | Anything on {S}? | And {S}? | {S}, please. | {S}. | {S}: go. | {S}, in short. | "{S}", explain.
{S}, what's that all about? | {S}: fact sheet. | {S}, if you would. | {S} is something I should know more about, I'm told. | {S} keeps coming up. Why? | {S} sounds familiar. From where?
{S} means nothing to me. Help? | {S} is new to me. | {S}, you say? Go on. | {S} in a single sentence, please. | {S} for dummies. | {S} again! What was it this time?
{S}, as you would describe it to a Martian. | Give me the lowdown on {S}. | Give me one true sentence about {S}. | Give it to me straight: {S}. | I can't place {S}. | I could use a line on {S}.
I'd never looked into {S} before. Where do I begin? | I've been meaning to ask about {S}. | I keep hearing about {S}. | I only know {S} by name. | I have no clue about {S}.
I'm curious about {S}. | I'm lost when it comes to {S}. | I was asked to report on {S}. | I wonder about {S}. | I need one line about {S}, nothing more. | If I say "{S}", what do you say?
If I only remember one thing about {S}, what should it be? | Is there anything I should know about {S}? | Is there a fact behind {S}? | Is {S} what I think it is? | Does {S} ring a bell?
Does anybody know about {S}? | Do you know {S}? | Do tell: {S}. | Ever heard of {S}? | Ever wondered about {S}? I have. | Could you brief me on {S}?
Could you say in a few words what there is to {S}? | Can you jog my memory about {S}? | Can you put {S} into context? | Bring me up to speed on {S}. | Catch me up on {S}.
Clue me in about {S}. | Shed some light on {S}. | Run me through {S}. | Walk me through {S} in a sentence. | What gives with {S}? | What is one supposed to know about {S}?
What is widely known about {S}? | What would you put under "{S}" in a glossary? | What would the entry for {S} say? | What would I find if I looked up {S}?
What would you tell a newcomer about {S}? | What do people get wrong about {S}? | What do insiders know about {S}? | What do you make of {S}? | What do you associate with {S}?
What does {S} bring to mind? | What does one say about {S} these days? | What's the deal with {S}? | What's the short answer on {S}? | What's all the fuss about {S}? | What's notable about {S}?
What's there to say about {S}? | What sets {S} apart? | What did I miss about {S}? | Where does one even start with {S}? | When {S} comes up, what do you think of?
When somebody says "{S}", what do they have in mind? | Who can tell me about {S}? | Why is {S} worth knowing about? | Why do I keep seeing {S} everywhere? | How would you sum up {S}?
How would you answer a question about {S}? | How should I think of {S}? | How much do you know about {S}? | How would a reporter open a piece on {S}? | Which sentence fits {S} best?
Which words belong with {S}? | On {S}: your view? | On the matter of {S}, what is the official line? | Regarding {S}, what do I need to know? | As for {S}: what is the case?
With regard to {S}, please inform me. | About {S}. What's the truth? | Concerning {S}: anything I should keep in mind? | Speaking of {S}, what do you know? | State the main fact about {S}.
State what {S} is known for. | Name the first thing that people learn about {S}. | Put {S} into plain words. | Say what you know of {S}, in one breath. | Spell it out for me: {S}.
Tell me the one thing about {S} that matters. | Tell me what you've got on {S}. | Tell me straight away: {S}. | Think of {S}. What comes first? | Talk to me about {S}. | Test yourself: {S}.
Look up {S} for me. | Let's get {S} straight. | Let's have it: {S}. | Let me hear about {S}. | Just {S}, nothing else. | Just tell me what {S} is about. | Not much time: {S}? | Next topic: {S}.
Now {S}. | Topic: {S}. | Keyword: {S}. | Today's word: {S}. | Your thoughts on {S}? | Your best sentence on {S}, please. | You know {S}, right? Tell me. | You have one sentence for {S}.
Nobody has ever explained {S} to me. | Somebody has to tell me about {S}. | There's something about {S}, but what? | There is one thing to know about {S}. Which? | The truth about {S}, please.
The facts on {S}? | In connection with {S}, what should be mentioned? | In what way is {S} special? | From scratch: {S}. | For somebody who knows nothing about {S}, what's the first sentence?
Okay, {S}. Shoot. | Pray tell, {S}? | Wait, {S}? | Hello, I'd like some information about {S}. | Hi, it's about {S} again. | Please, what about {S}? | Kindly explain {S}.
""")
FRAGMENTS = parts_of("""
{S} meaning | {S} explained | {S} info | {S} pls | {S} short summary | {S} facts | {S} ?? | {S} what to know | {S} simple explanation | {S} wiki | {S} faq | {S} in a few words | {S} tldr
{S} overview | {S} details please | Meaning of {S} | Define {S} | Whats {S} | Wats {S} about | Tell me {S} | About {S} | Info on {S} | Info {S} | Summary {S} | Explain {S} simply
Need info about {S} | Question about {S} | Anyone knows {S} | Key fact {S} | Quick facts {S} | Search: {S} | Lookup {S} | Trying to find out about {S} | So what about {S} then | Ok {S}
Dont get {S} | Help with {S} pls | Never heard of {S} lol | Tell me about {S} real quick | Idk what to say about {S} | Remind me, {S}
""")
CONTEXTS = parts_of("""
My sister mentioned {S} yesterday. | I saw {S} in the newspaper this morning. | There was a question about {S} in the exam. | My boss keeps talking about {S}.
We are going to discuss {S} in class tomorrow. | I overheard two people talking about {S} on the bus. | The radio had a programme on {S}. | Someone wrote "{S}" on the whiteboard.
My notes only say "{S}". | An old book on my shelf mentions {S}. | I have to give a talk about {S}. | My daughter asked me about {S}. | The last slide just said "{S}".
I got a message that only said "{S}". | Our guide said something about {S}, but I wasn't listening. | I'm translating a text that mentions {S}. | The puzzle has {S} as a clue.
My neighbour is crazy about {S}. | Grandfather always used to talk about {S}. | There's a poster about {S} in the hallway. | I found a letter in the attic that mentions {S}.
A customer called and asked about {S}. | The documentary I'm watching keeps coming back to {S}. | I missed the meeting about {S}. | Someone told me I should look into {S}.
I'm preparing a lesson on {S}. | The journalist wants a comment on {S}. | My friend from abroad has never heard of {S}. | We were playing a guessing game and the card said {S}.
I dreamt about {S} last night. | My homework is about {S}. | The teacher wrote {S} at the top of the page. | I'm updating an old article about {S}. | We have a bet running about {S}.
The quiz master said "{S}" and everybody went quiet. | I'm making a poster about {S}. | A stranger stopped me and asked about {S}. | They printed {S} on the T-shirts.
My grandmother wonders about {S}. | Everyone at work seems to know about {S}, except me. | I'm standing in front of a sign that says {S}. | The email's subject line was "{S}".
Two of my friends disagree about {S}. | An advert for {S} just popped up. | The chapter on {S} is missing from my copy. | I read half of an article on {S} and then my phone died.
I'm helping my nephew with a project on {S}. | The new colleague asked about {S} on the first day. | On page 12 it says "see {S}". | I've been asked to write a card about {S}.
For years I had the wrong idea of {S}. | I've got an appointment tomorrow that has to do with {S}. | We're planning a trip and {S} came up. | My uncle sent me a postcard about {S}.
The speaker dropped {S} into every second sentence. | My brother claims that he knows all about {S}. | I am writing a short story in which {S} plays a part.
At the market somebody was shouting about {S}. | Before I forget: {S}. | The label on the box reads "{S}". | {S} came up at lunch. | {S} was on the news. | {S} was the last item on the agenda.
{S} is on my reading list. | {S} was all my cousin wanted to talk about. | {S} stands at the top of my list. | {S} is what they asked me about. | {S}, that's what the note says.
{S} is the topic of tonight's talk. | Yesterday a colleague brought up {S}. | All evening it was {S} this, {S} that. | Out of nowhere my father said: {S}.
In the lift somebody whispered something about {S}. | In my dream there was a door marked "{S}". | At the dentist's I read about {S}.
At the end of the film somebody says "{S}" and everybody nods. | During the tour they pointed at a board about {S}. | During the call they mentioned {S} twice.
After the lecture on {S} I was more confused than before. | Over coffee we got on to {S}. | On the back of the envelope it says "{S}". | On the train two students were revising {S}.
Under "other", somebody entered {S}. | I have {S} on a sticky note. | I was told to read up on {S}. | I've been put in charge of the page on {S}. | I have to answer a letter about {S}.
I got {S} in a word game. | I came across {S} in a footnote. | I nodded when they mentioned {S}, but I had no idea. | I typed {S} and got nothing.
I can picture {S}, but I can't put it into words. | I looked for {S} in the index. | I lost a point because of {S}. | I told the kids that I know everything about {S}.
I wrote {S} on my hand so that I wouldn't forget. | I need a slide on {S}. | I need to brief somebody on {S}. | I'd like to say something about {S} in my speech. | I'm quite new to {S}.
I'm staring at a page headed "{S}". | I'm stuck on the clue "{S}". | I'm about to be interviewed on {S}. | I'm proofreading a brochure on {S}. | I'm supposed to know about {S} by tomorrow.
I'm recording a podcast and the next topic is {S}. | I'm labelling pictures and the next one shows {S}. | My dad swears by what he read on {S}. | My flatmate won't stop going on about {S}.
My pen pal wrote to me about {S}. | My teacher says that everybody should know about {S}. | My textbook has a box on {S}. | My phone keeps suggesting {S}. | My team has to present {S}.
My calendar has an entry that just says "{S}". | My grandson wants a bedtime story about {S}. | My sister and I have been arguing about {S}. | Our trainer opened with {S}.
Our newsletter has a column on {S} this month. | Our book club is reading about {S}. | Our word of the day is "{S}". | We skipped {S} in class. | We have a visitor who wants to hear about {S}.
We named our quiz team after {S}. | We're down to the last question and it's about {S}. | We're making cards for a game and one says {S}. | The caller wanted to know about {S}.
The article on {S} is behind a paywall. | The page about {S} doesn't load. | The kids made up a song about {S}. | The exhibition starts with {S}. | The form has a field for {S}.
The whole office was talking about {S}. | The librarian gave me a thin book on {S}. | The part about {S} got cut from the recording. | There's a rumour going round about {S}.
There's a whole shelf on {S} in our library. | There's a box labelled "{S}" in the cellar. | They wanted an example and I said {S}. | They asked for three sentences on {S} and I have none.
They corrected what I said about {S}. | They've updated the notes on {S}. | Somebody in the chat wrote just "{S}". | Somebody asked about {S} and then hung up.
Somebody underlined {S} in my library book. | Nobody at the table could say anything about {S}. | Nobody had prepared {S}. | A podcast I follow did an episode on {S}.
A student emailed me about {S}. | A tweet about {S} has a million likes. | A note in the margin says "cf. {S}".
""")
ASKS = parts_of("""
What is it about? | Can you explain? | What should I say? | Any idea? | What do I need to know? | Could you fill me in? | What's the point? | What did they mean? | Help me out.
What should I write? | What would you answer? | Please explain it to me in one sentence. | What was that about? | What do I tell them? | What's the right answer? | Can you help?
What is the key fact? | What am I supposed to know? | Give me one sentence on it. | Where does that come from? | Why is it mentioned? | Can you tell me more? | What might be the reason?
What's the correct information? | How should I reply? | I don't get it. | What would be a good summary? | How would you put it? | Tell me the essential part. | Which answer is right?
What is there to know? | What could I add? | And what exactly is that? | Why would that matter? | Meaning? | Explain? | And? | So? | Why? | How come? | Help? | Thoughts? | What now?
What gives? | What do you know? | What is that, in one line? | What does it come down to? | What would an expert say? | What would you have said? | What was meant? | What have I missed?
What's your take? | What's the story? | What do people say about it? | What does that tell me? | What does that refer to? | What should I tell her? | What should I have answered?
What should I bring up? | What can I say that is true? | What is essential here? | What is it that everybody else seems to know? | What would be a correct sentence about it?
Does it mean something? | Does that mean anything to you? | Do you know more? | Do I need to know that? | Is there something to it? | Is that important? | Is it worth reading up on?
Am I missing something? | Should I care? | Should I worry? | Can you shed some light on it? | Can you put it simply? | Can you save me? | Could you write the first sentence for me?
Could you tell me what to say? | Would you explain it to me? | Why would they say that? | Why did everybody nod? | How would you explain it? | How do I respond?
How do I explain that to a child? | Where do I start? | Which fact should I mention? | Which part of it do I need? | I'd rather not look silly. | I had to pretend. | I want to get it right.
I need something to say. | I could do with one good sentence. | I'm all ears. | Just one sentence. | Just the main thing. | Give me something to go on. | Give me the background.
Please enlighten me. | Please brief me. | Tell me what I should know. | Tell me more. | Over to you. | Anything helps. | Explain it so that I can repeat it. | Let me know what it's about.
Your guess is better than mine. | You tell me.
""")
DOCUMENTS = parts_of("""
The headline just says "{S}". | The headline reads "What you should know about {S}". | Subject line: {S}. The mail itself is empty. | Subject: {S}. | Re: {S}.
The sign at the entrance says "{S}", and below it there's a blank. | Minutes of the meeting, item 4: {S}. | Agenda: welcome, {S}, any other business.
To do: call mum, buy milk, find out about {S}. | Shopping list, notes, and in between: "{S}!" | Exam paper, question 5: {S}. | Chapter 3: {S}. | Table of contents, last entry: {S}.
The glossary ends with {S}. | The footnote says only "see {S}". | The caption under the picture is "{S}". | The label in the display case reads "{S}".
The card in the museum says "{S}" and the rest is torn off. | A sticky note on my screen: "{S}???" | A message from an unknown number: "{S}". | A text from my sister: "{S}, remember?"
Voice mail, barely audible: something about {S}. | Hashtag of the day: {S}. | The first line of the letter is "As for {S}, you know already". | The log has a line "unknown term: {S}".
The comment in the margin: "{S}? explain". | The form has a box for {S}. | Field 7 of the form: "{S}". | I've chosen {S} from the menu on the screen. | The slide has a single bullet point: {S}.
Slide 12: {S}. | The poster says "Ask me about {S}". | The badge says "Ask me about {S}". | The index sends me to page 40 for {S}.
The dictionary I have goes from {A} straight to {B}, without {S}. | The ticket says "{S}, see description", but there's no description. | The crossword clue is "{S}".
The crossword has "{S}" for 8 across. | The quiz card says "{S}" on the front. | The worksheet says "Explain {S} in your own words". | The essay title is "{S} and why it matters".
The exercise says "Say one true thing about {S}". | The spreadsheet has a row called {S} and an empty cell. | Column A: {A}, {B}, {S}. Next to {S}, column B is empty.
The diary entry of that day just says "{S}". | The notice board has a page on {S}. | The teaser says "After the break: {S}". | The old postcard has one word on it, more or less: {S}.
The first page of the manual has a box headed "{S}". | The file is called "{S} (final).txt" and it's empty. | The folder "{S}" has nothing in it. | The review begins with "{S}, of course".
Breaking news: {S}. | Letter to the editor: "Nobody has ever explained {S}." | From the FAQ: "What about {S}?" | From my lecture notes: "{S} = ..." | Wiki page, stub: {S}.
The transcript breaks off at "and when it comes to {S}, we all". | The banner over the street says "{S}". | The T-shirt says "I know about {S}". | The first flashcard in the pile: {S}.
Note to self: {S}. | PS: and don't forget {S}. | The fortune cookie said "{S}". | Somebody wrote "{S}" in the dust on my car. | The search box is already filled in with "{S}".
The programme for tonight says: 8 pm, {S}. | The chat topic was changed to "{S}".
""")
DOCUMENT_ASKS = parts_of("""
What is this about? | What goes under it? | What's it trying to tell me? | What should it say next? | What would the next line be? | What belongs in the blank? | What do I enter?
What do I write there? | What would a good answer be? | What would the full text say? | What did the author want to say? | What does one answer? | What's behind it? | What's the missing part?
What am I to make of that? | What does that tell me? | Complete it, please. | Write the rest. | Write the next sentence. | Write what belongs there. | Write the text for it.
Explain it, please. | Explain that in a sentence. | Fill it in for me. | Fill in what's missing. | Please continue. | Please add one sentence. | Finish it for me. | Help me decode this.
Decode that for me. | Any idea what it's about? | Any clue? | What goes there? | Fill the gap for me. | What should stand there? | What belongs in the first line? | Can you fill it in?
Can you make sense of it? | Can you write the line below it? | Could you draft the answer? | Could you add what readers need to know? | How would you finish that? | How should it go on?
How do I reply? | I don't know what to put. | I need the first sentence. | And the answer? | Tell me what's meant. | Tell me what it would say. | Does that mean anything?
Is there a fact behind it? | Which information is missing? | So what do I need to know? | Over to you. | One sentence, please.
""")
REPORTED = parts_of("""
So: {p} | My sister asks: "{p}" | They want to know this: {p} | The question is: {p} | What they ask me is: "{p}" | I have only one question. {p} | And then somebody asked: "{p}" | Below that: "{p}"
Please tell me. {p} | Do you happen to know? {p} | Help me answer this: {p} | {p} That is all I need. | {p} Nobody could say. | {p} I have to know by tonight. | {p} One line, please.
I was too shy to ask: {p} | Which made me wonder: {p} | Remind me: {p} | That leaves one thing. {p} | {p} They are waiting for me to say it. | "{p}" my neighbour asked. | {p} Serious question.
The first thing that people ask is: "{p}" | A voice from the back: "{p}" | {p} I said I would ask you. | I wanted to ask: {p} But I didn't dare.
""")
SCENES = parts_of("""
Two colleagues stand at the coffee machine. One says "{S}", the other one sighs. | We were in the car and my daughter read out a sign: {S}. I had no answer.
A woman at the counter asks about {S}. The clerk looks at me. | It's the last round. The host draws a card, looks at it and says: "{S}."
My uncle gave a toast last night. He ended it with {S}, and people clapped. | A boy runs up to his teacher. "Tell me about {S}!" he says.
Picture a job interview. They want to hear something about {S}, and I have a minute. | At the family dinner somebody mentioned {S}. There was a long silence, then everybody talked at once.
I sat next to a stranger on the plane. He told me all about {S}, and I remember nothing. | My neighbour rang the bell this morning. She wanted to know what I know about {S}.
Nina says that she has known about {S} for years. Tom has never heard of it. | Ben put {S} on the list. Mia crossed it out. | Lena shows Paul an article on {S}. He says it's all wrong.
Three friends play a guessing game. The first draws {A}, the second draws {B}, I draw {S}. | My boss walked past my desk and said "{S}". Then she was gone.
Our train stopped in the middle of nowhere, and the man across from me began to talk about {S}. | The teacher called me to the board. "{S}," she said and handed me the chalk.
I wanted to impress my girlfriend's parents. So I brought up {S}. Big mistake. | The lights go down, the curtain opens, and a voice says: {S}. That's how the play begins.
I woke up at four in the morning with one thought: {S}. Now I can't sleep. | We're a group of tourists and our guide has lost his voice. He points at the words "{S}" in his book.
A reporter calls our office about {S}. I'm the only one here. | Yesterday I visited my old school. On the wall there's still a drawing of {S}, and nobody could explain it.
The doctor's waiting room has one magazine. It has a long piece on {S}, but the pages stick together. | I run a small stall at the fair. People keep coming up to me with questions about {S}.
My son is six. For a week now it has been {S} from morning to night. | Our new trainee sat through the whole meeting. At the end he asked who or what {S} was.
She's writing a novel. In the first chapter an old man explains {S} to a child. | I dialled a wrong number. The man on the other end thought that I was calling about {S}.
You're at a party. Somebody turns to you and says: "You know about {S}, don't you?" | It's an oral exam. The examiner smiles and says "{S}".
In the pub last night they wouldn't believe me about {S}. Now I doubt it myself. | My two boys have been fighting over {S} all day. I have to decide.
The kids found a treasure map. There's a cross on it, and next to the cross it says {S}. | I emptied my grandfather's desk. In the bottom drawer was a folder marked "{S}".
The power went out just when they were getting to {S}. I never saw the end. | A parcel came without a sender. Inside was a card that said "{S}".
I gave my talk, all went well. Then came a question on {S}. | My mother-in-law sent me a long message. It's mostly about {S}.
""")
UNFINISHED = parts_of("""
{S} is ... | {S} is | {S}: | {S} = | {S} - | {S} → | {S}, which is | {S}, as everyone knows, | {S} is best known for | {S} is all about | As for {S}, | When it comes to {S},
The thing about {S} is that | The truth about {S}: | One thing is certain about {S}: | I looked it up, and {S} | So basically {S} | Fun fact: {S} | Did you know that {S} | Well, {S}
Dear diary, today I learned that {S} | Today I learned: {S} | My teacher told us that {S} | Everyone nodded when she said that {S} | In the dictionary, next to {S}, it says
According to the notes, {S} | It is a little-known fact that {S} | It turns out that {S} | Here is what we know about {S}: | What they never tell you about {S} is that | {S} ____.
____: that's {S}. | {S} (fill in): ______ | With {S}, the important thing is ______. | Complete: "{S} ..." | Complete the entry. {S}: | Finish the line: "If you ask me about {S}, I'd say"
Finish what I started: {S} is | Fill in the blank: when I think of {S}, I think of ____. | Continue in the same style: "{S}" | Term: {S}¶Meaning: | Name: {S}¶What it's about:
Topic: {S}¶In one sentence: | Front: {S}¶Back: | Clue: {S}¶Solution: | Entry: {S}¶Text: | Keyword: {S}¶Fact: | Subject: {S}¶Body: | Item: {S}¶Note: | {S}¶-
One sentence each.¶1. {A}: done¶2. {S}: | Title: {S}¶First sentence: | {A}: known. {B}: known. {S}: | {A}: see page 3. {B}: see page 8. {S}: | {A} = you know that. {S} =
List: {A} (explained above), {B} (explained above), {S} ( | To each its own: {A} has one meaning, {B} another, and {S} | {A} and {B} have been dealt with. {S}, on the other hand,
Match each with its fact. {A}: done. {S}: ? | {q} It's ... | {q} The answer is ____. | {q} Answer: | {q} I'd say it's | {q} Well, ... | {q} My answer begins like this: | {q} (one line):
Answer key. {q} | "{q}" "Oh, that's easy:
""")
TASKS = parts_of("""
Write one line on {S}. | Write a single sentence that explains {S}. | Write a sentence about {S} that is true. | Write a caption for {S}. | Write a label for {S}.
Write a comment that explains {S}. | Write a short reply to somebody who asks about {S}. | Write a text message to my friend about {S}. | Write a slogan about {S}. | Write a rhyme about {S}.
Write a two-line poem on {S}. | Write a haiku about {S}. | Write the first sentence of an article on {S}. | Write the opening of a speech about {S}. | Write a footnote on {S}.
Write a tooltip for {S}. | Write a quiz question about {S}, with its answer. | Write a note for the fridge about {S}. | Write a short notice on {S}. | Write a glossary entry: {S}.
Write a post about {S} that informs people. | Write an email to a colleague who doesn't know about {S}. | Write down what you know about {S}. | Compose a toast that mentions {S}.
Compose a short message about {S}. | Compose a jingle for {S}. | Draft a reply: "Thanks for asking about {S}." | Draft a one-sentence answer for our help desk; the topic is {S}.
Draft a sign about {S}. | Draft the back of a postcard about {S}. | Translate into plain English: {S}. | Translate {S} into words that a child understands. | Turn {S} into a sentence.
Turn what you know about {S} into a bullet point. | Make a bullet point about {S}. | Make up a mnemonic for {S}. | Make a multiple-choice question about {S} and mark the right answer.
Make me a note on {S}. | Make {S} memorable in one line. | Prepare one sentence on {S} for my talk. | Create a flash card. Front: {S}. What's on the back? | Summarise {S} for a busy manager.
Summarise everything on {S} in ten words. | Rewrite for beginners: {S}. | Replace the dots: "{S}, that's ..." | Put {S} on a card and write the explanation below.
Explain {S} in the form of a headline. | Explain {S} as a teacher would. | Explain {S} in words of one syllable. | Explain {S} to an alien. | Announce {S} on the radio.
Answer the phone: somebody is asking about {S}. | Report on {S}, one sentence. | Record a voice message that explains {S}. | Give me a chat reply about {S}.
Give me a line about {S} for my slides. | Give me a headline with {S} in it. | Give me a sentence in which {S} makes sense. | Give a definition or description, whichever fits: {S}.
Correct my notes: "{S}: no idea." | Fill the box: "{S} in brief". | Fill in the card for {S}. | I need a title and one sentence. Topic: {S}.
I need a toast for tonight, and it should mention what {S} is about. | Imagine a billboard about {S}. What does it say? | Could you phrase a reply to a reader who wonders about {S}?
Could you write the entry for {S}? | Help me word a short answer to a customer's question about {S}. | Sing me one line about {S}. | Tell it as a bedtime story, but keep the fact right: {S}.
Tell it like a news reader: {S}. | Test me: give me a question on {S} and then the answer. | Sort out my notes on {S} into one clear sentence.
Add {S} to this list with a short explanation: {A}, {B}.
""")
DOUBTS = parts_of("""
Am I right about {S}? | Am I wrong about {S}? | Am I the only one who gets {S} wrong? | Have I got {S} all wrong? | Have I misunderstood {S}? | Did I get {S} wrong all these years?
Is {S} really what people say it is? | Is {S} just a name, or is there more to it? | Is {S} real? | Is {S} a place, a person or what? | Is {S} good or bad news? | Is {S} a joke?
Is {S} the thing I'm thinking of, or have I got it wrong? | Is it just me or does nobody understand {S}? | Is it common knowledge, the thing about {S}?
Is what they say about {S} a myth or a fact? | Is there nothing to {S}, or is there? | Are we sure about {S}? | Are you sure you know {S}? | Do I remember {S} right?
Does {S} mean anything at all? | Does {S} even exist? | My brother says one thing about {S}, my sister says another. Who is right? | Two websites contradict each other on {S}. Which is right?
Somebody claims that {S} is nothing special. Is it? | Somebody claims that nobody knows about {S}. Prove them wrong. | He says I have no idea about {S}. Help me show him.
They say I made {S} up. Did I? | A friend bets that you don't know {S}. Do you? | I bet you can't tell me about {S}. | I bet ten to one that {S} is not what I think.
I doubt that you know anything about {S}. | I don't believe what they say about {S}. What is true? | I thought I knew {S}. Now I'm not so sure.
I always believed that {S} was nothing to talk about. Was I wrong? | I say {S} is simple, she says it's complicated. Decide. | I may be wrong about {S}, so correct me.
I've got {S} down as "unknown". Correct? | I heard {S} explained differently. What is it now? | True or false: nothing is known about {S}. | True or false: {S} is hard to explain.
Fact check, please: {S}. | Right or wrong: there's nothing to say about {S}. | Either {S} matters or it doesn't. Which, and why? | So {S} is nothing, right?
So {S} doesn't mean anything, does it? | Surely {S} isn't random? | Surely there's more to {S} than the name? | You don't know {S} either, do you? | You've never heard of {S}, have you?
Don't tell me you don't know {S}. | Nobody knows what {S} is about, or do you? | Could it be that I mixed up {S} and {A}? | Could it be that {S} is the same as {A}? | Wasn't {S} something else?
Wait, isn't {S} the same as {A}? | Hang on, I thought {S} was something else entirely. | {q} Or have I got it wrong? | {q} Or is that a trick question? | {q} I'd have said something else.
{q} My friend doesn't believe me. | {q} I bet you don't know. | {q} I have a guess, but I won't tell. | {q} Or does nobody know? | {q} People say different things.
{q} Or am I thinking of {A}? | {q} Not the same as for {A}, I suppose? | {q} Prove it if you can. | {q} I was told one thing and read another. | Is it a secret? {q} | Trick question? {q}
There's money on this. {q} | I lost the bet, I think. {q} | We can't agree. {q} | I'm sure, but she isn't: {l} | Correct me if it's a silly question, but {l}
""")
ROLES = parts_of("""
You are a tour guide. Somebody in the group asks about {S}. | You are a tour guide, and a tourist asks: "{q}" | You are a patient teacher. Explain {S}.
You are a help desk. The caller says: "{q}" | You are a dictionary. Look up {S}. | You are a quiz master. Give the solution for {S}. | You are a news reader. Today's item is {S}.
You are my tutor and I've just asked: {l} | You are a grumpy clerk. A customer asks: "{q}" | You are a walking encyclopedia. {S}?
You're the voice in the museum's headphones. The visitor presses the button for {S}. | You're on a game show and the word is "{S}".
You're a witness in court. "What do you know about {S}?" asks the judge. | You're a pirate, but a well-informed one. {q} | Play the teacher, I play the pupil. "{q}"
Play a game with me: I say {S}, you say what it's about. | Pretend that you're my grandfather and tell me about {S}. | Pretend we're on the radio. "And now, dear listeners, {S}."
Pretend that I've never heard of anything. {q} | Imagine I'm your boss and want a briefing on {S}. | Imagine you're writing to a pen friend about {S}.
Let's do a role play. I'm a customer: "Hello, {l}" | Act as an encyclopedia. Entry: {S}. | Act as a fact checker for {S}. | Act as my colleague. I lean over and ask: {l}
Speak as an expert on {S}. | Answer as a school book would: {l} | Answer as a friendly neighbour: {l} | As a librarian, what would you say about {S}?
As someone who knows {S} well, what do you tell beginners? | If you were a teacher, how would you begin a lesson on {S}? | If you were a signpost next to {S}, what would be written on you?
System check. Term: {S}. Output: one sentence. | Explain mode on. Input: {S} | Interviewer: "Let's turn to {S}." You: | Student: {q}¶Teacher: | Me: what about {S}?¶You:
Customer: I have a question about {S}.¶Agent: | A: Do you know {S}? B: Sure. A: Then tell me. B: | Host: "Our next word is {S}." Guest:
""")
COMPARISONS = parts_of("""
I know about {A} and {B}, but {S}? | {A} is clear to me. {S} is not. Explain. | First we talked about {A}, then about {B}. Now tell me about {S}. | Not {A}, not {B}: I mean {S}.
Don't tell me about {A}. Tell me about {S}. | Somebody mixed up {A} and {S}. What is right for {S}? | {A} has its page in my notebook, {B} too. What goes on the page of {S}?
My list says: {A}, {B}, {S}. What belongs next to the last one? | What would you say about {S}, compared with {A}? | If {A} is easy, then what about {S}?
{A}, {B}, {S}: tell me about the last one. | Between {A} and {S}, it's {S} I'm asking about. | {S}, not {A}. What's the fact? | I said {S}, you heard {A}. Again, please.
Forget {A} for a moment. What about {S}? | Unlike {A}, {S} is new to me. | {A} I can look up, {B} as well. But {S}? | Everybody knows {A}. Who knows {S}? | What does {S} have that {A} doesn't?
What separates {S} from {A}? | In what way is {S} not the same as {A}? | Is {S} just another {A}, or is there a difference? | Are {S} and {A} the same? | How does {S} differ from {A} and {B}?
If {A} is one thing and {B} another, what is {S}? | Last week {A}, yesterday {B}, today {S}: what's the lesson? | My flashcards: {A} (done), {B} (done), {S} (to do).
We've ticked off {A} and {B}. {S} is left. | I always confuse {S} with {A}. Sort it out for me. | From {A} to {B} I'm fine; at {S} I fail. | {A}? Check. {B}? Check. {S}? Help.
You explained {A} well. Now do {S}. | Skip {A} and {B}, go straight to {S}. | She asked about {A}, he asked about {B}, I ask about {S}. | Of {A}, {B} and {S}, I only need the last.
They wrote {A} where it should say {S}. What do I say about {S}? | The index goes {A}, {B}, {S}. Read me the last entry. | Someone swapped the labels of {S} and {A}. What belongs to {S}?
{S}, as opposed to {A}: please explain. | Instead of {A}, give me {S}. | One paragraph on {A}, one on {B}, none on {S}. Write the last.
Which of these is new to you: {A}, {B} or {S}? Tell me about {S}. | {q} And don't mix it up with {A}. | {q} I know the answer for {A}. | {q} I'm not asking about {A}.
For {A} I have an answer. {q} | Not about {A}, please: {l} | First {A}, then {B}, and now: {l}
""")

TRAINING_FAMILIES = (
    TemplateFamily(8, (LEAD_INS,)),
    TemplateFamily(5, (QUESTION, TRAILERS)),
    TemplateFamily(5, (CONTEXTS_WITHOUT, QUESTION)),
    TemplateFamily(7, (QUOTED,)),
    TemplateFamily(12, (GENERAL,)),
    TemplateFamily(3, (FRAGMENTS,)),
    TemplateFamily(9, (CONTEXTS, ASKS)),
    TemplateFamily(5, (CONTEXTS, PRONOUN)),
    TemplateFamily(2, (CONTEXTS, REPORTED)),
    TemplateFamily(7, (DOCUMENTS, DOCUMENT_ASKS)),
    TemplateFamily(2, (DOCUMENTS, PRONOUN)),
    TemplateFamily(2, (DOCUMENTS, REPORTED)),
    TemplateFamily(6, (SCENES, ASKS)),
    TemplateFamily(3, (SCENES, REPORTED)),
    TemplateFamily(6, (UNFINISHED,)),
    TemplateFamily(5, (TASKS,)),
    TemplateFamily(6, (DOUBTS,)),
    TemplateFamily(3, (ROLES,)),
    TemplateFamily(4, (COMPARISONS,)),
)

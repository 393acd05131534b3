"""Devanagari to the Latin letters that people type: no diacritics, schwas dropped, English words in
English. No torch.

    python -m text.romanise "मैं कल बाज़ार गया था"              # main kal bazar gaya tha
    python -m text.romanise --style 3 < hindi.txt > hinglish.txt

Used by prepare (--romanise). Style 0 takes the commonest spelling everywhere; any other number is
one typist, whose habits (aa or a, w or v, ph or f, ...) come from the number and stay the same
through a text. A word is looked up in the tables (irregular and English words), otherwise spelled
in three steps: `units` (letters to syllables), `silence` (which inherent vowels nobody says),
`spell` (sounds to Latin, by the typist's habits). Everything that is not Devanagari stays as it is.
"""
import argparse
import random
import re
import sys
import unicodedata

from common.console import run
from text.starter import lexicon

# ---- tables: letters to sounds -------------------------------------------------------------------
# sounds: one Latin letter or digraph for a consonant; capitals are the long or second vowel: A aa,
# I ee, U oo, E ai, O au
CONSONANTS = dict(zip(
    "क ख ग घ ङ च छ ज झ ञ ट ठ ड ढ ण त थ द ध न प फ ब भ म य र ल ळ व श ष स ह ॸ ॹ ॺ ॻ ॼ ॾ ॿ".split(),
    "k kh g gh n ch chh j jh N t th d dh n t th d dh n p P b bh m y r l l v sh sh s h d z y g j d b".split(), strict=True))
NUKTA = {"क": "q", "ख": "X", "ग": "G", "ज": "z", "झ": "z", "ड": "D", "ढ": "Dh", "फ": "f"}    # q X G D: see HABITS
VOWELS = dict(zip("अ आ इ ई उ ऊ ऋ ॠ ऌ ॡ ऍ ऎ ए ऐ ऑ ऒ ओ औ ऄ ॲ ॳ ॴ ॵ ॶ ॷ ॐ".split(),
                  "a A i I u U R R R R e e e E o o o O a e a o O u U om".split(), strict=True))
SIGNS = dict(zip("ा ि ी ु ू ृ ॄ ॅ ॆ े ै ॉ ॊ ो ौ ॢ ॣ ऺ ऻ ॏ ॎ ॖ ॗ ॕ".split(),
                 "A i I u U R R e e e E o o o O R R o o O e u U e".split(), strict=True))
VIRAMA, NUKTA_SIGN, NASALS, VISARGA = "\u094d", "\u093c", "\u0900\u0901\u0902", "\u0903"
SPECIAL = {"॰": "."} | {chr(0x966 + digit): str(digit) for digit in range(10)}
RUN = re.compile("([\u0900-\u0963\u0971-\u097f][\u0900-\u0963\u0971-\u097f\u200c\u200d]*| ?[।॥]+|[०-९॰]+)")


def units(word):
    """A word as syllables [onset, vowel, nasal]: onset a list of sounds, vowel '' where a virama
    ends it. Any string gives some: no error.
    """
    out = []
    last = ""
    for c in unicodedata.normalize("NFD", word):
        if c in CONSONANTS:
            if out and last == VIRAMA:
                out[-1][0].append(CONSONANTS[c])
                out[-1][1] = "a"
            else:
                out.append([[CONSONANTS[c]], "a", ""])
        elif c == NUKTA_SIGN:
            if last in NUKTA and out:
                out[-1][0][-1] = NUKTA[last]
            c = last                   # a virama or sign may follow as after the letter
        elif c == VIRAMA:
            if out and last in CONSONANTS:
                out[-1][1] = ""
        elif c in SIGNS:
            if last in CONSONANTS:
                out[-1][1] = SIGNS[c]
            else:
                out.append([[], SIGNS[c], ""])
        elif c in VOWELS:
            out.append([[], VOWELS[c], ""])
        elif c in NASALS and out:
            out[-1][2] = "n"
        elif c == VISARGA and out:
            out[-1][2] = "h"
        if c not in "\u200c\u200d":
            last = c
    return out


# ---- tables: words -------------------------------------------------------------------------------
# what no rule gives: a word and its spellings, the commonest first and each as often as it is
# common; more in starter/lexicon.py
TYPED = """
बस bas  द्वारा dwara/dvara  स्वयं swayam  एवं evam/evan  है hai/hai/hai/he  हैं hain/hain/hai  मैं main/main/mai/mai
में mein/mein/me/me  हूँ hoon/hu/hun  नहीं nahi/nahi/nahin/nhi  यह yeh/ye/ye  वह wo/woh/vo  ये ye/ye/yeh  वे ve/wo  क्या kya
कुछ kuch  और aur/aur/or  ने ne  से se  मुझे mujhe/mujhe/muje  क्यों kyun/kyon/kyu  क्यूँ kyun/kyu  क्योंकि kyunki/kyonki/kyuki
यहीं yahin/yahi  वहीं wahin/wahi  कहीं kahin/kahi  यहाँ yahan/yahan/yaha  वहाँ wahan/wahan/vahan/waha  कहाँ kahan/kahan/kaha
जहाँ jahan/jahan/jaha  हाँ haan/haan/han  माँ maa/maa/ma  मैंने maine/maine/mene  हम hum/hum/ham  हमें humein/hume/hamen
हमने humne/hamne  हमसे humse/hamse  हमको humko/hamko  हमारा hamara/humara  तुम्हें tumhein/tumhe/tumhen
उन्हें unhein/unhe/unhen  इन्हें inhein/inhe/inhen  जिन्हें jinhein/jinhe/jinhen  किन्हें kinhein/kinhe  उन्होंने unhone/unhonne
इन्होंने inhone  जिन्होंने jinhone  दोनों dono/donon  तीनों teeno/teenon  लोगों logon/logo  पहले pehle/pehle/pahle
पहला pehla/pahla  पहली pehli/pahli  पीछे peeche/piche/pichhe  पिछला pichla/pichhla  पिछले pichle/pichhle  पूछ puch/pooch/poochh
गई gayi/gayi/gai  गईं gayi/gayin  गए gaye/gaye/gae  गये gaye  गयी gayi  आई aayi/aai/ayi  आए aaye/aye  नई nayi/nai  नए naye/nae
हुए hue/huye  हुई hui/huyi  हो ho  थीं thi/thin  दीं di/din  कीं ki  लीं li  रुपये rupaye/rupees/rs  रुपए rupaye/rupees/rs
चाय chai/chai/chay  गाय gaay/gay  राय rai/raay  गाँव gaon/gaon/gaanv  पाँव paon/paanv  छाँव chhaon  नाँव naav  दाँव daav
राव rao  चाव chaav  ज़िंदगी zindagi/zindagi/jindagi  ज़्यादा zyada/zyada/jyada  चीज cheez/cheej  जरूर zaroor/jarur
जरूरत zaroorat/jarurat  नजर nazar/najar  हजार hazaar/hajar  ज्यादा zyada/zyada/jyada  फिर phir/phir/fir  बहुत bahut/bahut/bohot
छह chhah/che/6  छः chhah/che  क्रिया kriya  प्रति prati  अंदर andar  वाला wala/wala/vala  वाले wale/wale/vale
वाली wali/wali/vali  वालों walon/walo  वापस wapas/vapas  जवाब jawab/javab  हवा hawa/hava  आवाज़ awaaz/aawaz/awaz
वक़्त waqt/vakt  वक्त waqt/vakt  वजह wajah/vajah  स्वागत swagat  बहन behan/bahan  बहनें behnein/bahnen  कहना kehna/kahna
रहना rehna/rahna  कहते kehte/kahte  रहते rehte/rahte  कहता kehta/kahta  रहता rehta/rahta  कहती kehti/kahti  रहती rehti/rahti
कहने kehne/kahne  रहने rehne/rahne  महँगा mehnga/mahanga  महँगी mehngi/mahangi  महँगे mehnge/mahange  शहर shehar/shahar
शहरों shehron/shahron  ज़हर zeher/zahar  लहर lehar/lahar  ठहर thehar/thahar  मेहरबानी meherbani  महसूस mehsoos/mahsus
श्री shri/shree  श्रीमती shrimati  श्रीनगर srinagar  लखनऊ lucknow  कानपुर kanpur  कोलकाता kolkata  कलकत्ता calcutta
दिल्ली dilli/delhi  इंदौर indore  हैदराबाद hyderabad  हिंदी hindi  हिन्दी hindi  हिंदू hindu  हिन्दू hindu  संस्कृत sanskrit
अंग्रेज़ी angrezi/english  अंग्रेज angrez  ब्राह्मण brahman  ब्रह्मा brahma  सिंह singh/sinh  सिंहासन sinhasan  नरसिंह narsingh
विष्णु vishnu  कृष्ण krishna  राम ram  सीता sita  शिव shiv  रामायण ramayan  महाभारत mahabharat  भारत bharat  योग yoga/yog
बुद्ध buddh  शुक्रिया shukriya  मेहनत mehnat  मोहब्बत mohabbat  इंतज़ार intezar/intezaar  इंतजार intezar/intezaar
तकलीफ takleef/taklif  दुनिया duniya  आदमी aadmi/admi  औरत aurat  लड़का ladka/larka  लड़की ladki/larki  बच्चा baccha/bacha
बच्चे bacche/bache/bachche  बच्चों bacchon/bachon  अच्छा accha/acha/achha  अच्छे acche/ache/achhe  अच्छी acchi/achi/achhi
सच्चा saccha/sacha  इच्छा ichha/iccha  दुःख dukh  दुख dukh  अस्पताल aspatal/hospital  कड़ाही kadhai  पुलाव pulao  इलायची elaichi
आइए aaiye  जाइए jaiye  खाइए khaiye  चाहिए chahiye/chahiye/chaiye  चाहिये chahiye  सन् san  जश्न jashn  आधार aadhar
छुट्टी chhutti/chutti  कप्तान kaptan  पाँच paanch/panch  अर्थात् arthat  ॐ om  जयपुर jaipur  उदयपुर udaipur  रायपुर raipur
नौकरी naukri  तिवारी tiwari  द्विवेदी dwivedi  चौधरी chaudhary  बनर्जी banerjee  मुखर्जी mukherjee  चटर्जी chatterjee
शास्त्री shastri  शर्मा sharma  वर्मा verma  मिश्रा mishra  गुप्ता gupta  गाँधी gandhi  नेहरू nehru  मोदी modi  खान khan
"""

# English words in English; फ़ ज़ क़ and ँ are written here without their dots
LOANS = """
ऑफिस office  स्कूल school  कॉलेज college  फोन phone  मोबाइल mobile  ट्रेन train  कार car  टैक्सी taxi  ऑटो auto  रिक्शा rickshaw
साइकिल cycle  बाइक bike  स्कूटर scooter  ट्रक truck  जीप jeep  मेट्रो metro  स्टेशन station  प्लेटफॉर्म platform  टिकट ticket
एयरपोर्ट airport  होटल hotel  रेस्टोरेंट restaurant  रेस्तरां restaurant  हॉस्पिटल hospital  डॉक्टर doctor  डाक्टर doctor
नर्स nurse  इंजेक्शन injection  ऑपरेशन operation  पुलिस police  इंस्पेक्टर inspector  जज judge  कोर्ट court  वोट vote
पार्टी party  मीटिंग meeting  कंपनी company  कम्पनी company  मैनेजर manager  बॉस boss  सर sir  मैडम madam  मिस्टर mister
मिस miss  बैंक bank  चेक check  कैश cash  लोन loan  एटीएम atm  कार्ड card  क्रेडिट credit  डेबिट debit  बिल bill  टैक्स tax
बजट budget  मार्केट market  शॉपिंग shopping  मॉल mall  स्टोर store  ऑनलाइन online  ऑफलाइन offline  इंटरनेट internet
वेबसाइट website  वेब web  साइट site  ईमेल email  मैसेज message  चैट chat  कॉल call  वीडियो video  विडियो video  ऑडियो audio
फोटो photo  कैमरा camera  फिल्म film  टीवी tv  रेडियो radio  न्यूज news  चैनल channel  सीरियल serial  हीरो hero  हीरोइन heroine
डायरेक्टर director  म्यूजिक music  डांस dance  गिटार guitar  गेम game  गेम्स games  मैच match  टीम team  क्रिकेट cricket
फुटबॉल football  हॉकी hockey  टेनिस tennis  बैडमिंटन badminton  बॉल ball  बैट bat  कप cup  रन run  विकेट wicket  कोच coach
कंप्यूटर computer  कम्प्यूटर computer  लैपटॉप laptop  टैबलेट tablet  टेबलेट tablet  टैब tab  कीबोर्ड keyboard  माउस mouse
प्रिंटर printer  प्रिंट print  स्क्रीन screen  डिस्प्ले display  टच touch  बैटरी battery  चार्जर charger  चार्जिंग charging
ब्लूटूथ bluetooth  वाईफाई wifi  नेटवर्क network  सिग्नल signal  डेटा data  डाटा data  फाइल file  फाइलें files  फोल्डर folder
डाउनलोड download  अपलोड upload  अपडेट update  इंस्टॉल install  ऐप app  एप app  ऐप्स apps  एप्स apps  ऐप्लिकेशन application
एप्लीकेशन application  सॉफ्टवेयर software  हार्डवेयर hardware  सिस्टम system  विंडो window  विंडोज windows  ब्राउजर browser
ब्राउजिंग browsing  सर्वर server  लॉगिन login  लॉग log  पासवर्ड password  यूजर user  यूजर्स users  अकाउंट account
प्रोफाइल profile  सेटिंग setting  सेटिंग्स settings  डिवाइस device  एडमिन admin  कोड code  लिंक link  पेज page  टेक्स्ट text
फॉन्ट font  फॉर्म form  फॉर्मैट format  फॉर्मेट format  कॉपी copy  पेस्ट paste  क्लिक click  बटन button  मेन्यू menu  आइकॉन icon
आइकन icon  टाइप type  सर्च search  गूगल google  फेसबुक facebook  ट्विटर twitter  व्हाट्सएप whatsapp  यूट्यूब youtube
सैमसंग samsung  माइक्रोसॉफ्ट microsoft  एंड्रॉयड android  एंड्रायड android  क्रोम chrome  स्मार्टफोन smartphone  स्मार्ट smart
फीचर feature  फीचर्स features  क्वालिटी quality  साइज size  स्टाइल style  डिजाइन design  मॉडल model  कलर color  स्पीड speed
पावर power  पॉवर power  प्रोसेसर processor  मेमोरी memory  रैम ram  स्टोरेज storage  पिक्सल pixel  मेगापिक्सल megapixel
फ्रंट front  बैक back  साउंड sound  वॉल्यूम volume  स्पीकर speaker  हेडफोन headphone  लाइट light  फ्लैश flash
ऑटोमैटिक automatic  मोड mode  कंट्रोल control  सपोर्ट support  सर्विस service  प्रोडक्ट product  प्रॉडक्ट product  ब्रांड brand
पेमेंट payment  ऑर्डर order  डिलीवरी delivery  ऑफर offer  डिस्काउंट discount  टाइम time  मिनट minute  सेकंड second
सेकेंड second  डेट date  टेस्ट test  एग्जाम exam  रिजल्ट result  क्लास class  टीचर teacher  प्रोफेसर professor
प्रिंसिपल principal  स्टूडेंट student  होमवर्क homework  प्रोजेक्ट project  यूनिवर्सिटी university  डिग्री degree  कोर्स course
पेपर paper  पेन pen  पेंसिल pencil  नोट note  नोट्स notes  बुक book  लाइब्रेरी library  रिपोर्ट report  रिकॉर्ड record
रिकार्ड record  फॉर्मूला formula  नंबर number  नम्बर number  लिस्ट list  प्लान plan  आइडिया idea  टेंशन tension
प्रॉब्लम problem  सॉरी sorry  थैंक्यू thankyou  थैंक thank  प्लीज please  हैलो hello  हेलो hello  ओके ok  गुड good  बाय bye
वेलकम welcome  हैप्पी happy  लव love  गर्लफ्रेंड girlfriend  बॉयफ्रेंड boyfriend  फ्रेंड friend  अंकल uncle  आंटी aunty
बेबी baby  मम्मी mummy  पापा papa  डैडी daddy  सिस्टर sister  ब्रदर brother  टेबल table  बेड bed  सोफा sofa  फैन fan
फ्रिज fridge  कूलर cooler  हीटर heater  बल्ब bulb  स्विच switch  मशीन machine  इंजन engine  टायर tyre  पेट्रोल petrol
डीजल diesel  गैस gas  सिलेंडर cylinder  बोतल bottle  गिलास glass  प्लेट plate  केक cake  बिस्कुट biscuit  ब्रेड bread
चॉकलेट chocolate  कॉफी coffee  जूस juice  पिज्जा pizza  बर्गर burger  आइसक्रीम icecream  सूप soup  चिकन chicken  शर्ट shirt
पैंट pant  जींस jeans  कोट coat  स्वेटर sweater  जैकेट jacket  शूज shoes  बैग bag  पर्स purse  ड्रेस dress  फैशन fashion
मेकअप makeup  इंजीनियर engineer  ड्राइवर driver  ड्राइव drive  डिजिटल digital  ट्रैफिक traffic  रोड road  पार्क park
पार्किंग parking  गार्डन garden  क्लब club  सिटी city  ब्रिज bridge  टाउन town  फ्लैट flat  अपार्टमेंट apartment
बिल्डिंग building  रूम room  बाथरूम bathroom  किचन kitchen  लिफ्ट lift  गेट gate  इंडिया india  अमेरिका america
इंग्लैंड england  लंदन london  यूरोप europe  एशिया asia  अफ्रीका africa  ऑस्ट्रेलिया australia  फ्रांस france  जर्मनी germany
पाकिस्तान pakistan  बांग्लादेश bangladesh  ब्रिटेन britain  यूके uk  यूएस us  सेंटर center  नेशनल national
इंटरनेशनल international  ग्रुप group  कमेटी committee  मिनिस्टर minister  एजेंट agent  एजेंसी agency  सेक्रेटरी secretary
एक्टर actor  एक्शन action  कनेक्शन connection  कनेक्ट connect  एक्सेस access  ऐक्सेस access  सेट set  लोड load  ऑन on  ऑफ off
स्टार्ट start  स्टॉप stop  रीसेट reset  रीस्टार्ट restart  ब्लॉक block  लॉक lock  अनलॉक unlock  फिल्टर filter  बैकअप backup
स्क्रिप्ट script  टूल tool  टूलबार toolbar  डिफॉल्ट default  शॉर्टकट shortcut  पोर्ट port  यूएसबी usb  स्कैन scan  स्लाइड slide
शीट sheet  मीडिया media  कास्ट cast  ट्रैक track  टास्क task  चार्ज charge  फुल full  लाइफ life  वाइफ wife  हाउस house
बोर्ड board  बॉक्स box  सोर्स source  ऑपरेटिंग operating  मैनेज manage  प्लास्टिक plastic  मीटर meter  किलोमीटर kilometer
किलो kilo  लीटर litre  इंच inch  फुट foot  डॉलर dollar  परसेंट percent  मिलियन million  क्लीन clean  वर्शन version  बैंड band
रॉकेट rocket  बम bomb  गन gun  टैंक tank  कैंसर cancer  वायरस virus  वैक्सीन vaccine  कोरोना corona  लॉकडाउन lockdown
मास्क mask  जनवरी january  फरवरी february  मार्च march  अप्रैल april  मई may  जून june  जुलाई july  अगस्त august
सितंबर september  अक्टूबर october  नवंबर november  दिसंबर december  संडे sunday  मंडे monday  फ्राइडे friday  बॉलीवुड bollywood
हॉलीवुड hollywood  स्टार star  सुपर super  फाइनल final  सीन scene  शो show  लाइव live  ब्रेक break  एंड and  फॉर for  लेवल level
पॉइंट point  प्वाइंट point  स्पेशल special  जनरल general  सोशल social  लोकल local  ग्लोबल global  पब्लिक public
प्राइवेट private  पॉलिसी policy  सीनियर senior  जूनियर junior  मास्टर master  चैंपियन champion  चैम्पियन champion  वर्ल्ड world
लीग league  प्रेस press  मैगजीन magazine  ड्रामा drama  कॉमेडी comedy  एक्सपर्ट expert  लीडर leader  स्टेट state  कैंप camp
कैम्प camp  फायर fire  गार्ड guard  ड्रग drug  केमिकल chemical  मेडिकल medical  मेडिसिन medicine  बिजनेस business
मैनेजमेंट management  इंडस्ट्री industry  फैक्ट्री factory  एक्सप्रेस express  स्पेस space  रॉक rock  लेडी lady  किंग king
क्वीन queen  ग्रीन green  रेड red  ब्लू blue  ब्लैक black  व्हाइट white  यूनिट unit  ग्रेड grade  कैप्टन captain  मेजर major
मिशन mission  कमीशन commission  पेंशन pension  सेशन session  फंक्शन function  कंडीशन condition  एयर air  वाटर water
पाउडर powder  क्रीम cream  न्यू new  बेस्ट best  फर्स्ट first  लास्ट last  नेक्स्ट next  एक्स्ट्रा extra  टोटल total
टैलेंट talent  फ्लाइट flight  ड्रिंक drink  पार्टनर partner  फैमिली family  लंच lunch  डिनर dinner  अवॉर्ड award  अवार्ड award
फेस face  स्टेज stage  टूर tour  प्लेयर player  ओलंपिक olympic  मेडल medal  गोल्ड gold  सिल्वर silver  ब्रॉन्ज bronze  रेस race
रिव्यू review  स्कोर score  सीरीज series  सीजन season  एपिसोड episode  फैक्टर factor  थ्योरी theory  साइंस science
केमिस्ट्री chemistry  फिजिक्स physics  मैथ math  इंजीनियरिंग engineering  टेक्नोलॉजी technology  रिसर्च research  लैब lab
रोबोट robot  सैटेलाइट satellite  सेटेलाइट satellite  टेलीविजन television  टेलीफोन telephone  माइक्रोफोन microphone
स्पीकिंग speaking  ट्रेनिंग training  सर्टिफिकेट certificate  लाइसेंस license  पासपोर्ट passport  वीजा visa  ट्रैवल travel
टूरिस्ट tourist  गाइड guide  मैप map  लोकेशन location  सर्कल circle  स्क्वायर square  कॉर्नर corner  टावर tower  हॉल hall
थिएटर theatre  सिनेमा cinema  टायलेट toilet  टॉयलेट toilet  कमोड commode  फर्नीचर furniture  अलार्म alarm  रिमाइंडर reminder
टाइमर timer  कैलेंडर calendar  इवेंट event  अटेंड attend  इनवाइट invite  ग्रेजुएशन graduation  एडमिशन admission  हॉस्टल hostel
कैंटीन canteen  इंटरव्यू interview  रिज्यूमे resume  सैलरी salary  बोनस bonus  प्रमोशन promotion  ट्रांसफर transfer
पेट्रोलियम petroleum  कमर्शियल commercial  डायरेक्ट direct  इंडियन indian  अमेरिकन american  ब्रिटिश british
क्रिश्चियन christian  चर्च church  मैरिज marriage  डायरी diary  इंश्योरेंस insurance  गारंटी guarantee  वारंटी warranty
क्रेन crane  कंक्रीट concrete  सीमेंट cement  स्टील steel  पाइप pipe  वायर wire  केबल cable  नेट net  पैकेट packet
पैकेज package  पैक pack  बोलीवुड bollywood  एसएमएस sms  ईएमआई emi  पैन pan  एडवांस advance  एक्सीडेंट accident
एम्बुलेंस ambulance  एंबुलेंस ambulance  इमरजेंसी emergency  फैसिलिटी facility  सिक्योरिटी security  कॉन्ट्रैक्ट contract
कांट्रैक्ट contract  कमेंट comment  लाइक like  शेयर share  सब्सक्राइब subscribe  फॉलो follow  पोस्ट post  ब्लॉग blog
ट्वीट tweet  सेल्फी selfie  सेलेब्रिटी celebrity  हिट hit  फ्लॉप flop  सुपरहिट superhit  सिंगर singer  सॉन्ग song  एल्बम album
बीट beat  पॉप pop  ट्रेलर trailer  टीजर teaser  कैरेक्टर character  रोल role  विलेन villain  स्टोरी story
"""
LETTERS = """
ए a  बी b  सी c  डी d  ई e  एफ f  जी g  एच h  आई i  जे j  के k  एल l  एम m  एन n  ओ o  पी p  क्यू q  आर r  एस s  टी t  यू u  वी v
डब्ल्यू w  एक्स x  वाई y  जेड z
"""
# members of compounds: a word is spelled in parts where one begins or ends it
FIRST = """प्र प्रश्न पत्र राज जल लोक देव जन राम धर्म कर्म सर्व युद्ध चित्र वेद मार्ग रक्त अर्थ पूर्ण दिन बाल गुण पर्व हर नर ग्राम
नव शिव धन देश उप एक आत्म भाग काम तीर्थ वर्ष दूर घर मन सह अन गैर खान पंच रण जय विकास समाज शब्द"""
LAST = """वती मती पत्र पत्रों चरण चरणों पतियों कर पुर गढ़ नगर वाद वादी वादियों शाला करण खाना खाने खानों दार दारी दारों बाज़ बाज़ी नाक
कार कारी कारों पन वाला वाले वाली वालों मय जनक मान शील पूर्वक पूर्ण पति नाथ गंज ता ती ते तीं ना नी ने नीं ताओं भर गार दान तम तर
पाल लाल स्वरूप हीन रहित सहित देशीय गण शास्त्र यात्रा मंत्री निवासी वासी प्रद युक्त मुक्त संघ"""

# ---- letters to sounds ---------------------------------------------------------------------------
LONG_WORD = 60             # letters; longer runs are no words: neither cut into members nor remembered
LABIALS = ("p", "P", "b", "bh", "m")


def silence(syllables):
    """Mark the inherent vowels that nobody says, '_': the last one, then from the right each one
    between simple syllables.
    """
    if len(syllables) > 1 and last_is_silent(syllables):
        syllables[-1][1] = "_"
    for i in range(len(syllables) - 2, 0, -1):
        if is_silent(syllables, i):
            syllables[i][1] = "_"
    return syllables


def last_is_silent(syllables):
    """dharm, dil, tay; but mitra, vakya, krishna, priya."""
    onset, vowel, nasal = syllables[-1]
    if vowel != "a" or not onset or nasal:
        return False
    if onset[-2:] in (["j", "N"], ["sh", "n"]):
        return False
    if len(onset) > 1 and onset[-1] != onset[-2] and onset[-1] in "yr":
        return False
    return onset != ["y"] or syllables[-2][1] not in ("i", "I")


def is_silent(syllables, i):
    """Is the vowel of a syllable inside the word silent? Those to its right are decided."""
    onset, vowel, nasal = syllables[i]
    after, next_vowel, _ = syllables[i + 1]
    if vowel != "a" or not onset or nasal or not after:
        return False

    # between vowels that are said, and simple consonants
    if syllables[i - 1][1] in ("", "_") or next_vowel in ("", "_"):
        return False
    sound = "".join(onset)
    next_sound = "".join(after)
    if len(onset) > 1 and sound not in ("rm", "rth"):
        return False
    if len(after) > 1 and next_sound[1:] != "r":
        return False

    # not after a vowel that runs into it, nor before the last of a long word
    if onset == ["y"] and syllables[i - 1][1] in ("a", "i"):
        return False
    left = len(syllables) - i
    return not (i > 1 and (left == 2 or next_vowel == "i" and left == 3))     # biradari, sarvjanik


def members(word):
    """Cut a compound where FIRST or LAST say so; a member begins with a consonant, and what it
    leaves is no single letter.
    """
    for i in range(min(len(word) - 2, LONGEST), 1, -1):
        if word[:i] in FIRST and word[i] in CONSONANTS and len(units(word[i:])) > 1:
            return [word[:i], *members(word[i:])]
    for i in range(max(2, len(word) - LONGEST), len(word)):
        if word[i:] not in LAST or word[i - 1] == VIRAMA:
            continue
        left = units(word[:i])
        if left and (word[i - 1] in SIGNS or len(left) > 1 and len(left[-1][0]) == 1):
            return [*members(word[:i]), word[i:]]
    return [word]


# ---- sounds to spelling --------------------------------------------------------------------------
LONG = {"A": ("a", "aa"), "I": ("i", "ee"), "U": ("u", "oo")}
# all places of a long vowel but the end of a word
EVERYWHERE = ("start", "mono", "last", "first", "mid")
# where a typist doubles the vowel
SHORT = {"A": ("start",), "I": (), "U": ()}
USUAL = {"A": ("start", "mono"), "I": ("mono",), "U": ("mono",)}
MORE = {
    "A": ("start", "mono", "last"),
    "I": ("mono", "last"),
    "U": ("mono", "last", "first"),
}
MOST = dict.fromkeys("AIU", EVERYWHERE)
# habit -> its spellings, the commonest first and each as often as it is common; a typist draws one
# of them
HABITS = {
    "v": ("v", "v", "w"),
    "Cv": ("v", "w"),
    "P": ("f", "f", "ph"),
    "z": ("z", "z", "j"),
    "q": ("k", "k", "q"),
    "X": ("kh",),
    "G": ("g", "g", "gh"),
    "D": ("d", "d", "d", "r"),
    "Dh": ("dh", "dh", "dh", "rh"),
    "N": ("n",),
    "chh": ("chh", "chh", "ch"),
    "sh": ("sh", "sh", "sh", "sh", "sh", "s"),
    "ksh": ("ksh", "ksh", "ksh", "ksh", "x"),
    "chchh": ("cch", "chh", "chchh"),
    "chch": ("cch", "chch", "ch"),
    "double": (1, 1, 1, 0),
    "ri": ("ri",),
    "glide": ("y", "y", ""),
    "eh": ("e", "a"),
    "en": ("en", "ein", "en", "e"),
    "no_n": ("I", "I", "", "AIUo"),
    "long": (
        USUAL,
        USUAL,
        USUAL,
        SHORT,
        MORE,
        MOST,
        USUAL | {"A": EVERYWHERE},
        MOST | {"A": ("start", "mono")},
    ),
}


def consonants(onset, habit):
    """A run of consonant sounds as letters: jN gy, kkh, tth, ddh, cch."""
    letters = []
    for i, sound in enumerate(onset):
        before = onset[i - 1] if i else ""
        after = onset[i + 1] if i + 1 < len(onset) else ""
        c = habit.get(sound, sound)
        if (sound, after) == ("j", "N"):
            c = "g"
        elif (before, sound) == ("j", "N"):
            c = "y"
        elif sound == "v" and before:
            c = habit["Cv"]
        elif sound == "ch" and after in ("ch", "chh"):     # bachcha, achchha
            c = habit["ch" + after]
        elif before == "ch" and sound in ("ch", "chh"):
            c = ""
        elif after in (sound, sound + "h"):
            c = c[0] if habit["double"] else ""
        letters.append(c)
    return "".join(letters).replace("ksh", habit["ksh"])


def spell(syllables, habit):
    """Syllables to Latin by one typist's habits."""
    out = []
    voiced = [i for i, (_, vowel, _) in enumerate(syllables) if vowel not in ("", "_")]
    for i, (onset, vowel, tail) in enumerate(syllables):
        after = syllables[i + 1] if i + 1 < len(syllables) else None
        before = syllables[i - 1][1] if i and not onset else ""          # two vowels meet

        # the vowel
        if vowel in LONG:
            place = place_of_vowel(syllables, i, voiced)
            letters = LONG[vowel][place in habit["long"][vowel]]
        else:
            letters = {"_": "", "E": "ai", "O": "au", "R": habit["ri"]}.get(vowel, vowel)
        if vowel == "a" and after and after[:2] == [["h"], "_"]:         # pehla, mehnat
            letters = habit["eh"]
        if before and (vowel == "e" and before in "aAiI" or vowel in "AoO" and before in "iI"):
            letters = habit["glide"] + letters                           # gaye, liye, kiya

        # the nasal or visarga after it
        if tail == "n" and after is None:
            if vowel == "e":
                letters = letters[:-1] + habit["en"]
            elif vowel not in habit["no_n"]:
                letters += "n"
        elif tail == "n" and after[0][:1] != ["n"]:                      # maine, unhone
            letters += "m" if after[0] and after[0][0] in LABIALS else "n"
        elif tail == "h" and after is None:
            letters += "h"
        out.append(consonants(onset, habit) + letters)
    return "".join(out)


def place_of_vowel(syllables, i, voiced):
    """Where in the word a long vowel stands: one of EVERYWHERE, or its end. voiced: the syllables
    whose vowels are said.
    """
    onset, _, tail = syllables[i]
    if i + 1 == len(syllables):
        return "end"
    if i == 0 and not onset:
        return "start"
    # a single vowel between single consonants: kaam; but gyan, kand
    simple = i + 2 == len(syllables) and len(onset) == len(syllables[-1][0]) == 1 and not tail
    if len(voiced) == 1 and simple:
        return "mono"
    if i == voiced[-1]:
        return "last"
    return "first" if i == 0 else "mid"


def plain(word):
    """A word as the tables are asked for it: decomposed, without joiners, the dots of f z q, and
    candrabindu.
    """
    word = unicodedata.normalize("NFD", word)
    word = word.replace("\u200c", "").replace("\u200d", "").replace("\u0901", "\u0902")
    return re.sub(f"(?<=[कखगजफ]){NUKTA_SIGN}", "", word)


def read_table(table):
    """{word: its spellings}; two spaces or a line end stand between the entries."""
    found = {}
    for entry in re.split(r"  +|\n", table.strip()):
        word, spelling = entry.split()
        found[plain(word)] = spelling
    return found


def read_members(table):
    return {unicodedata.normalize("NFD", word) for word in table.split()}


def read_starter():
    """Words as the starter corpus types them; rows with a phrase (_) are left out."""
    tables = [lexicon.WORDS, lexicon.AGREEING, *lexicon.NOUNS.values(), *lexicon.PEOPLE.values()]
    pattern = "(?<![\u0900-\u097f_])([\u0900-\u097f]+) +([a-z]+)(?![a-z_])"
    return {plain(word): typed for word, typed in re.findall(pattern, " ".join(tables))}


TYPED = read_table(TYPED)
LOANS = read_table(LOANS)
LETTERS = read_table(LETTERS)
FIRST = read_members(FIRST)
LAST = read_members(LAST)
LONGEST = max(map(len, FIRST | LAST))
LETTER_NAME = re.compile("|".join(sorted(LETTERS, key=len, reverse=True)))
COMMON = {name: options[0] for name, options in HABITS.items()}
STARTER = read_starter()


# ---- words ---------------------------------------------------------------------------------------

def acronym(word):
    """बीजेपी -> bjp: a word that is nothing but names of Latin letters; two of them need a vowel
    letter and a consonant.
    """
    names = LETTER_NAME.findall(word)
    if len(names) < 2 or "".join(names) != word:
        return ""
    if len(names) == 2 and (not re.search("[एईआओय]", word) or word[0] in "ओआ"):
        return ""
    return "".join(LETTERS[name] for name in names)


def foreign(word):
    """An English word of LOANS, perhaps with a Hindi or English plural; else ''."""
    for end, latin in (("", ""), ("\u094bं", "on"), ("\u0947ं", "en"), ("\u094dस", "s"), ("स", "s")):
        stem = word.removesuffix(end)
        if word.endswith(end) and stem in LOANS:
            return LOANS[stem] + latin
    # kampaniyon: companiyon
    if word.endswith(("\u093fयों", "\u093fयां")):
        stem = LOANS.get(word[:-4] + "\u0940", "")
        if stem[-1:] == "y":
            return stem[:-1] + ("iyon" if word[-2] == "\u094b" else "iyan")
    return ""


def rules(word, habit):
    """A word by the rules alone."""
    word = unicodedata.normalize("NFD", word)
    parts = members(word) if len(word) <= LONG_WORD else [word]
    syllables = []
    for part in parts:
        syllables += silence(units(part))
    return spell(syllables, habit)


class Romaniser(dict):
    """One typist; called with a text -> the text in Latin letters. The dictionary is the cache of
    the words met.
    """

    def __init__(self, style=0):
        super().__init__()
        # random() is the stream that Python keeps; the order of the draws is the typist
        rnd = random.Random(f"aria romanise {style}").random

        def pick(options):
            return options[int(rnd() * len(options)) if style else 0]

        self.style = style
        self.habit = {name: pick(options) for name, options in HABITS.items()}
        self.typed = {word: pick(options.split("/")) for word, options in TYPED.items()}
        # the habits of the starter corpus's typists
        self.respelled = {}
        for line in lexicon.SPELLINGS.strip().split("\n"):
            rows = [option.split() for option in line.split("|")]
            self.respelled |= dict(zip(rows[0], pick(rows), strict=True))

    def __missing__(self, token):
        """One run of Devanagari letters, or of dandas, or of digits."""
        if token[-1] in "।॥":
            result = "."
        elif token[0] in SPECIAL:
            result = "".join(SPECIAL[c] for c in token)
        else:
            result = self.word(token)
        if len(self) < 200_000 and len(token) <= LONG_WORD:
            self[token] = result
        return result

    def word(self, word):
        """By the tables if it is there, else by the rules."""
        key = plain(word)
        spelled = self.typed.get(key) or foreign(key) or acronym(key)
        if not spelled and self.style == 0:
            spelled = STARTER.get(key)
        if not spelled:
            spelled = rules(word, self.habit)
        return self.respelled.get(spelled, spelled)

    def __call__(self, text):
        parts = RUN.split(text)
        parts[1::2] = map(self.__getitem__, parts[1::2])
        return "".join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m text.romanise", description="Type Devanagari text in Latin letters."
    )
    parser.add_argument(
        "text", nargs="*", help="the text; without it, standard input line by line"
    )
    parser.add_argument(
        "--style",
        type=int,
        default=0,
        help="0: the commonest spellings; any other number is one typist",
    )
    args = parser.parse_args(argv)
    romaniser = Romaniser(args.style)
    lines = [" ".join(args.text) + "\n"] if args.text else sys.stdin
    for line in lines:
        sys.stdout.write(romaniser(line))


if __name__ == "__main__":
    run(main)
